"""What becomes of a step's outputs: tokens in their requests, and the ends of requests."""

from __future__ import annotations

import time

import numpy as np

from jkv.decoding import faults
from jkv.decoding.arguments import TokenizerLike
from jkv.decoding.prompts import PAD
from jkv.decoding.stopping import StopMatch, first_stop
from jkv.engine.decode_state import (
    ENDED,
    NO_PAGE,
    NONE_ALLOWED,
    NONFINITE_LOGITS,
    NONFINITE_PAGE,
)
from jkv.engine.request import Request
from jkv.engine.runner import StepOutput
from jkv.engine.scheduler import Scheduler
from jkv.engine.sequence import RunningSequence
from jkv.engine.stats import Stats
from jkv.errors import NonFiniteError


class OutputProcessor:
    """Appends generated tokens to their requests, and ends those that are complete.

    Args:
        scheduler: with the sequences that generate.
        tokenizer: for stop strings, or None.
        stats: counts what happens.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: TokenizerLike | None, stats: Stats):
        self.scheduler, self.tokenizer, self.stats = scheduler, tokenizer, stats

    def process(self, output: StepOutput) -> tuple[int, int]:
        """Append a step's tokens; how many those are, and of how many lanes."""
        table = self.scheduler.table
        lanes, tokens, flags = output.lane_ids, output.tokens, output.flags
        single = flags | (table.bulk_ids[lanes] != output.sequence_ids)
        one_by_one = single.nonzero()[0].tolist()
        # Most lanes just go on, with as many tokens as a step can generate: those in bulk.
        bulk = (single == 0).nonzero()[0] if one_by_one else slice(None)
        new = tokens[bulk]
        table.append(lanes[bulk], new)
        count, generating = new.size, len(new)
        for row in one_by_one:
            if table.ids[lanes[row]] != output.sequence_ids[row]:
                continue  # the sequence has left its lane since
            new = tokens[row][tokens[row] != PAD].tolist()
            appended = self._process_row(int(lanes[row]), new, int(flags[row]))
            count, generating = count + appended, generating + (appended > 0)
        return count, generating

    def _process_row(self, lane: int, tokens: list[int], flags: int) -> int:
        """Append the tokens of one lane and look at its flags; how many tokens were appended."""
        sequence = self.scheduler.sequence_in(lane)
        if flags & NO_PAGE:
            raise RuntimeError(f"lane {lane} had no page for a token: an error in jkv")
        if flags & NONFINITE_PAGE:
            self._end_nonfinite(sequence)
            return 0
        undrawable = bool(flags & (NONFINITE_LOGITS | NONE_ALLOWED))
        if tokens:
            self._append(sequence, tokens, undrawable or not flags & ENDED)
        if undrawable and self.scheduler.is_running(sequence):
            self._end_undrawable(sequence, by_sampler=bool(flags & NONE_ALLOWED))
        return len(tokens)

    def end_if_complete(self, request: Request) -> None:
        """End a request whose tokens show that it is complete."""
        tokens = request.tokens
        if not tokens:
            return
        try:
            match = self._match(request, tokens, len(tokens)) if request.stop_strings else None
        except Exception as error:  # a tokenizer that cannot decode these tokens
            request.end("error", error)
            return
        if match is not None or tokens[-1] in request.stop_ids:
            request.end("stop")
        elif len(tokens) >= request.max_new_tokens:
            request.end("length")

    def _append(self, sequence: RunningSequence, tokens: list[int], active: bool) -> None:
        """Append a sequence's new tokens, and end its request if it is complete."""
        scheduler, request, lane = self.scheduler, sequence.request, sequence.lane
        table = sequence.table
        if not request.watched:
            table.bulk_ids[lane] = table.ids[lane]
        if scheduler.share and sequence.published < sequence.target:
            scheduler.publish(sequence, sequence.target)
        if request.first_token is None:
            request.first_token = time.perf_counter()
            self.stats.first.append(request.first_token - request.submitted)
        stopped = False
        if request.watched:
            try:
                stopped = self._append_watched(request, tokens)
            except Exception as error:
                # A user's callback, or a tokenizer that cannot decode these tokens: that concerns
                # this request only.
                request.end("error", error)
            if not scheduler.is_running(sequence):
                return  # cancelled by its own callback
        table.append(np.asarray([lane]), np.asarray([tokens], np.int32))
        if request.endings or stopped:
            scheduler.finish(request, "stop")
        elif not active:
            at_stop = request.tokens[-1] in request.stop_ids
            scheduler.finish(request, "stop" if at_stop else "length")

    def _append_watched(self, request: Request, tokens: list[int]) -> bool:
        """Append tokens one by one, up to a stop string; whether there is one.

        A token in the request has been given to its callback, or is being given: after an
        interrupt it is not given again.
        """
        generated = request.generated
        match = None
        if request.stop_strings:
            match = self._match(request, generated + tokens, len(tokens))
        for token in tokens if match is None else tokens[: match.kept - len(generated)]:
            generated.append(token)
            if request.on_token is not None:
                request.on_token(request, token)
                if request.endings:
                    break
        return match is not None

    def _match(self, request: Request, tokens: list[int], new: int) -> StopMatch | None:
        """Find a stop string that is complete in one of the last `new` tokens of a request."""
        return first_stop(self.tokenizer, request.stop_strings, request.prompt, tokens, new)

    def _end_nonfinite(self, sequence: RunningSequence) -> None:
        """End a request whose pages were given values that they cannot hold."""
        message = (
            f"the model made NaN or infinity of this request's tokens, at step "
            f"{len(sequence.request.tokens)} or soon after (step 0 is the first new token), which "
            "no code of these pages can hold; look for such values in the weights"
        )
        self.scheduler.finish_unusable(sequence, NonFiniteError(message))

    def _end_undrawable(self, sequence: RunningSequence, *, by_sampler: bool) -> None:
        """End a request whose next token could not be drawn.

        Where the model is the cause its pages may hold NaN, so they are not reused.
        """
        request = sequence.request
        cause = faults.SAMPLER if by_sampler else faults.MODEL
        error = NonFiniteError(
            f"a token could not be drawn, at step {len(request.tokens)} (step 0 is the first new "
            f"token): {cause}"
        )
        if by_sampler:
            self.scheduler.finish(request, "error", error)
        else:
            self.scheduler.finish_unusable(sequence, error)
