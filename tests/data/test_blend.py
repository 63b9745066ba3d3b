"""Two streams in one: each at its pace, every sample a pure function, every visit found again."""

import pytest

from headspring.data.batch import Visit
from headspring.data.blend import Blend
from headspring.data.conversations import PackedConversations
from headspring.data.packing import PackedTokens
from headspring.data.tasks import TaskConfig, mine
from headspring.text.documents import Document
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from tests.data.corpora import make_shards, rows

SOURCES = [f"def load{i}(path{i}, size={i}):\n    return path{i} * size\n" for i in range(30)]
DOCUMENTS = [Document(text, "t", "code", f"{i}.py", 0, len(text)) for i, text in enumerate(SOURCES)]
TOKENIZER = train_tokenizer(SOURCES, TokenizerConfig(vocab_size=300))
LENGTH, SAMPLES = 128, 60


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Conversations about documents, and the same documents as text."""
    tasks = mine(DOCUMENTS, TaskConfig(kinds=("name", "parameters")))
    shards = make_shards(tmp_path_factory.mktemp("shards"), rows(DOCUMENTS), TOKENIZER)
    return {
        "conversations": PackedConversations(tasks, TOKENIZER, LENGTH, num_samples=SAMPLES),
        "text": PackedTokens(shards, "train", LENGTH, packing="best_fit", num_samples=SAMPLES),
    }


def blend(streams, **weights) -> Blend:
    return Blend(streams, weights or {"conversations": 0.7, "text": 0.3}, SAMPLES)


def visits_by_looking(data: Blend) -> dict[str, set[Visit]]:
    """The slow, obvious inverse: ask each stream where its own samples are, and look up where those stand."""
    found: dict[str, set[Visit]] = {document.id: set() for document in DOCUMENTS}
    places = {data.schedule.locate(index): index for index in range(SAMPLES)}
    for name, stream in data.streams.items():
        for document in DOCUMENTS:
            for visit in stream.where(document.id):
                if (name, visit.sample) in places:
                    spans = (visit.start, visit.end, visit.byte_start, visit.byte_end)
                    found[document.id].add(Visit(places[name, visit.sample], *spans))
    return found


def test_each_stream_has_its_share_from_the_first_sample_on(streams):
    data = blend(streams)
    assert data.counts == {"conversations": 42, "text": 18}
    for length in range(1, SAMPLES):
        drawn = sum(data.schedule.locate(index)[0] == "text" for index in range(length))
        assert abs(drawn - 0.3 * length) <= 1


def test_samples_are_those_of_the_streams_in_order_and_nothing_is_left_out(streams):
    data = blend(streams)
    seen = [data.schedule.locate(index) for index in range(SAMPLES)]
    for name, count in data.counts.items():
        assert [k for stream, k in seen if stream == name] == list(range(count))
    for index in reversed(range(SAMPLES)):  # in any order: pure
        name, k = seen[index]
        ours, theirs = data.sample(index), streams[name].sample(k)
        assert (ours.inputs == theirs.inputs).all() and (ours.targets == theirs.targets).all()
    with pytest.raises(IndexError):
        data.sample(SAMPLES)


def test_where_is_the_inverse_of_sample_through_both_streams(streams):
    data = blend(streams)
    expected = visits_by_looking(data)
    for document in DOCUMENTS:
        visits = data.where(document.id)
        assert visits == sorted(visits, key=lambda visit: (visit.sample, visit.start))
        assert set(visits) == expected[document.id] and len(visits) == len(expected[document.id])
    covered = {(visit.sample, place) for each in expected.values() for visit in each for place in range(visit.start, visit.end)}
    for index in range(SAMPLES):  # every input but padding is some document's
        inputs = data.sample(index).inputs
        assert [(index, place) in covered for place in range(LENGTH)] == (inputs != TOKENIZER.pad_id).tolist()


def test_control_a_stream_that_keeps_its_own_numbers_is_noticed(streams):
    """The planted bug: visits that are not moved to where the stream's samples stand in the blend."""
    data = blend(streams)
    expected = visits_by_looking(data)
    unmoved = {document.id: set(streams["text"].where(document.id)) for document in DOCUMENTS}
    assert any(unmoved[name] - expected[name] for name in expected)


def test_a_longer_run_begins_with_the_shorter_one(streams):
    long, short = blend(streams), Blend(streams, {"conversations": 0.7, "text": 0.3}, 20)
    assert [long.schedule.locate(i) for i in range(20)] == [short.schedule.locate(i) for i in range(20)]


def test_one_stream_alone_is_itself(streams):
    data = Blend({"text": streams["text"]}, {"text": 1.0}, SAMPLES)
    assert all(data.where(document.id) == streams["text"].where(document.id) for document in DOCUMENTS)
