"""What is learned of the place that a call comes from: whether others keep its input, or its output.

NOTE [ Learning what is kept ]

Whether somebody else keeps a call's input or output is only known when the forward is over. It is the same in the next
step, though, and so it is learned for each *site*: the module, and the place in a module's code from which the call
came (one ReLU module may serve at three places).

1. An unknown site is coded, and watched through weak references: of what its node saved, and of its output.
2. When the forward is over (a scope is left, or a backward begins) it is seen which of these storages are alive.
   Modules still in their forward are left out: their local variables are alive.
3. Two steps in a row that agree decide. *Input kept*: coding frees nothing, the call is left alone. *Output kept*: f'
   is had from the output, and the input goes (NOTE [ Beside a kept output ]), unless the output was seen to be changed
   in place. *A copy of the output kept*: the same, from the copy (NOTE [ Beside a copy ]). *Neither*: codes.
4. All this is known of a place in one *state*: the module's mode, and which of the model's parameters require a
   gradient (a frozen layer keeps no input). Steps that alternate between states, a GAN's say, each have sites of their
   own.
5. Some changes nothing announces. Codes are watched in each step, and an output that is relied upon tells when nobody
   else keeps it. What is left alone is looked at again every `LOOK_AGAIN` steps: it is kept as it is then, too, but by
   us, so that we see who else holds it. To code it for a look would be to approximate it for that long: in
   `BCELoss()(sigmoid(z))`, which divides by the derivative, the gradient of a wrong answer that was given with
   confidence would be thousands of times too large in these steps.
6. A call whose graph was dropped before the look says nothing: its result was thrown away.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ._modules import ModuleRef

LOOK_AGAIN = 64
"""Steps after which a site is looked at again: a change that nothing announces costs memory for that long at most."""
AGREE = 2


class Verdict(enum.Enum):
    """What is to be done at a site."""

    UNKNOWN = "unknown"
    CODES = "codes"
    LEAVE = "leave"
    OUTPUT = "output"
    COPY = "copy"  # a copy of the output
    INPUT = "input"  # never learned: OUTPUT where those that keep the output can compute it again from the input
    LOOK = "look"  # never learned: LEAVE, and it is time to look again


FROM_OUTPUT = Verdict.OUTPUT, Verdict.COPY
"""Where the derivative is had from the output."""


@dataclass(slots=True)
class Calls:
    """The calls that came from a place in one step.

    Attributes:
        made: how many there were.
        missed, served: of so many the input was asked for in vain, or given.
    """

    step: int = -1
    made: int = 0
    missed: int = 0
    served: int = 0


class Site:
    """What is known of one place in one state.

    Attributes:
        module: whose forward makes the call.
        model: the outermost module around it, as seen when a model's first site was last found in a step.
        verdict: what is to be done there.
        output_changes: its output, or the copy, was seen to be changed in place, so that it is never relied upon.
        output_stays: its output was seen to be kept although all that is known to keep it can compute it again.

    What is kept may be the output, or something made of it, the output with dropout say. Whether it could be computed
    again, if only the input were kept, is told by those that would keep it (`asked_for`), and tried once (`serves`).
    All calls of a step must be asked for, as all are to keep their inputs then. What was tried in vain, as somebody
    else keeps the output too (a BatchNorm beside a Linear), is not tried again: input and output are held then.
    """

    __slots__ = (
        "_agreed",
        "_alone",
        "_before",
        "_found",
        "_now",
        "_step",
        "_tried",
        "model",
        "module",
        "output_changes",
        "output_stays",
        "verdict",
    )

    def __init__(self, module: ModuleRef, model: ModuleRef) -> None:
        self.module = module
        self.model = model
        self.begin_anew()

    def begin_anew(self) -> None:
        """As if no call had come from here."""
        self.output_changes = self.output_stays = False
        self._alone = 0
        self._before, self._now = Calls(), Calls()  # of the last two steps in which there were any
        self.forget()

    def visit(self, step: int) -> None:
        """A call comes from here; a single look of long ago is forgotten."""
        if step != self._now.step:
            self._before, self._now = self._now, Calls(step)
        self._now.made += 1
        if self.verdict is Verdict.UNKNOWN and self._is_old():
            self.forget()

    def take_back(self, step: int) -> None:
        """The step's forward failed: as if it had made no call here."""
        if self._now.step == step:
            self._now = self._before

    def _is_old(self) -> bool:
        """What was seen here was seen long ago."""
        return self._agreed > 0 and self._now.step - self._step > LOOK_AGAIN

    @property
    def is_due(self) -> bool:
        """It was left alone for so long that it is to be looked at again."""
        return self.verdict is Verdict.LEAVE and self._is_old()

    def looked_again(self, kept: bool, step: int) -> None:
        """Whether somebody else keeps what was kept for a look."""
        if kept:
            self._step = step
        else:
            self.forget()

    def forget(self) -> None:
        """Unknown again."""
        self.verdict = self._found = Verdict.UNKNOWN
        self._agreed = self._step = 0
        self._tried = -1  # the step in which it was
        for calls in (self._before, self._now):
            calls.missed = calls.served = 0

    def distrust_output(self) -> None:
        """The output, or the copy, was changed in place, or may be unseen: never rely upon it."""
        self.output_changes = True
        self.forget()

    def found_alone(self) -> None:
        """In a step, nobody else kept the output that was relied on; if it happens again, never rely upon it."""
        self._alone += 1
        self.output_changes |= self._alone >= AGREE
        self.forget()

    def asked_for(self, step: int, *, given: bool) -> None:
        """Somebody would compute again what was made of a call's output; he was, or was not, given the input."""
        if step == self._now.step:
            if given:
                self._now.served += 1
            else:
                self._now.missed += 1

    def serves(self) -> bool:
        """Whether the inputs are to be kept for those who asked in the step before."""
        before, now = self._before, self._now.step
        if self._tried == now or (before.served and before.served >= before.made):
            return True
        if self._tried >= 0 or not before.missed or before.missed + before.served < before.made:
            return False
        self._tried = now
        return True

    @property
    def expected(self) -> Verdict:
        """What the last look said, decided or not."""
        return self._found

    def learn(self, found: Verdict, step: int) -> None:
        """One more look; calls of one place that differ within a step leave it at codes."""
        if self._agreed and step == self._step:
            if found is not self._found:
                self._found, self._agreed = Verdict.CODES, 1
        else:
            self._agreed = self._agreed + 1 if found is self._found else 1
            self._found = found
        self._step = step
        self.verdict = self._found if self._agreed >= AGREE else Verdict.UNKNOWN

    def see(self, input_kept: bool, output_kept: bool, copy_kept: bool, treated: Verdict, step: int) -> None:
        """The forward is over: whether what a call's node would have kept, its output, and copies of that are kept by
        somebody else.

        Args:
            treated: as what the call was treated; see `Watch`.
        """
        if treated is Verdict.OUTPUT:
            if self._is_old():
                if input_kept:
                    self.forget()
                self._tried, self._step = -1, step  # what was tried in vain may serve by now
            return  # what the packed object holds tells nothing of what others do
        if treated is Verdict.INPUT:
            self.output_stays |= output_kept
        elif input_kept:
            self.learn(Verdict.LEAVE, step)
        elif self.output_changes or not (output_kept or copy_kept):
            self.learn(Verdict.CODES, step)
        else:
            self.learn(Verdict.OUTPUT if output_kept else Verdict.COPY, step)

    def treatment(self, recompute: bool) -> Verdict:
        """The verdict. INPUT where those that keep the output, or something made of it, can compute it again; LOOK
        where what is left alone is to be looked at again."""
        if self.is_due:
            return Verdict.LOOK
        can_go = self.verdict is Verdict.CODES or (self.verdict is Verdict.OUTPUT and not self.output_stays)
        return Verdict.INPUT if recompute and can_go and self.serves() else self.verdict
