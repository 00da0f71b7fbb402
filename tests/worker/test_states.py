import pytest

from worker.states import MOVES, TERMINAL, State

# The figure of docs/04-service.md, written out a second time: "from" -> every state that may follow.
CHAINS = """
queued      -> running failed cancelling
running     -> finalizing failed cancelling
finalizing  -> succeeded failed cancelling
cancelling  -> cancelled
succeeded   -> expired
failed      -> expired
cancelled   -> expired
expired     ->
"""


def test_the_moves_are_those_of_the_documentation() -> None:
    rows = [line.split("->") for line in CHAINS.strip().splitlines()]
    assert {State(origin.strip()): frozenset(map(State, targets.split())) for origin, targets in rows} == MOVES


@pytest.mark.parametrize("state", State)
def test_a_terminal_state_only_ever_becomes_expired(state: State) -> None:
    assert (state in TERMINAL) == (MOVES[state] <= {State.EXPIRED})
