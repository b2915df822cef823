"""People beside a training: which of its images they are asked about, and when it waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from socket import socket

from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.access import TOKEN_VARIABLE, token
from rlhf_t2i.annotation.acquisition import certainty, choose_questions
from rlhf_t2i.annotation.live_records import NUM_IMAGES, NewQuestion
from rlhf_t2i.annotation.live_serve import LiveService, TrainingState, serving
from rlhf_t2i.annotation.live_votes import LiveVotes
from rlhf_t2i.seeds import ANNOTATE, generator_for
from rlhf_t2i.settings.live_preferences import Config


class LiveSession:
    """Questions to people and their votes, in the training's thread."""

    def __init__(self, votes: LiveVotes, training: TrainingState, config: Config, *, temperature: float) -> None:
        """`training` is what the page says; score differences divided by `temperature` are log-odds."""
        self.votes, self.training, self.config, self.temperature = votes, training, config, temperature
        self._ask_more: Callable[[], None] = lambda: None

    def ask(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], scores: Float[Tensor, "E P K"], *, step: int
    ) -> None:
        """Put questions about a step's images, K of each of P prompts, before people, and withdraw older ones."""
        config, copies = self.config, scores.shape[-1]
        chosen = choose_questions(
            scores, num_images=NUM_IMAGES[config.question], temperature=self.temperature, rule=config.acquisition,
            count=max(config.questions_per_step, config.first_votes - self.votes.num_votes),
            generator=generator_for(config.seed, ANNOTATE, step, self.votes.num_questions),
        )  # fmt: skip
        found = [(one, [images[one.prompt * copies + i].cpu() for i in one.images]) for one in chosen]
        questions = [NewQuestion(prompts[one.prompt * copies], own, one.favourite) for one, own in found]
        self.votes.offer(step, questions, max_age=config.max_question_age)
        self.training.certainty = certainty(scores, temperature=self.temperature)
        self._ask_more = lambda: self.ask(images, prompts, scores, step=step)

    def wait(self, *, stop_requested: Callable[[], bool]) -> None:
        """Wait for the first votes of a run, and while somebody has paused training; a request to stop ends it.

        People who have voted on all questions meanwhile get more about the same images.
        """

        def is_over() -> bool:
            missing = max(0, self.config.first_votes - len(self.votes.records()))
            if missing and not self.votes.num_open:
                self._ask_more()
            self.training.phase = f"waiting for the first votes, {missing} to go" if missing else "learning from votes"
            return stop_requested() or (not missing and self.training.paused_by is None)

        self.votes.wait(is_over)


@contextmanager
def live_session(
    folder: Path, listener: socket, config: Config, *, temperature: float, log: Callable[[str], None]
) -> Iterator[LiveSession]:
    """Serve the page of a run's votes within the context, from a thread of its own."""
    guideline = Path(config.guideline).read_text(encoding="utf-8") if config.guideline else ""
    training = TrainingState(num_steps=config.num_steps)
    with closing(LiveVotes(folder, kind=config.question, seed=config.seed)) as votes:
        service = LiveService(votes, training, secret=token(), guideline=guideline)
        with serving(service, listener) as address:
            needs = f" (it requires the token in {TOKEN_VARIABLE})" if service.secret else ""
            log(f"votes     {votes.num_votes}, in {votes.folder}\npage      {address}{needs}")
            yield LiveSession(votes, training, config, temperature=temperature)
