"""The report: complete, honest about what did not improve, one file that loads nothing, safe against its content."""

import json
import re
from html.parser import HTMLParser

import pytest

from headspring.artifacts import UserError
from headspring.artifacts.files import read_json, write_json
from headspring.line.report import formats, write_report
from headspring.line.report.charts import Series, bucketed, line_chart, nice_ticks
from headspring.line.report.comparisons import difference_interval, matrix, verdicts
from headspring.line.report.compression import compression
from headspring.line.report.funnel import funnel
from headspring.line.report.reading import read_run
from tests.line.fabricate import fabricate_run, rate

STAGES = ["data", "tokenizer", "tokens", "baselines", "pretrain", "sft", "dpo", "evaluate-initial", "evaluate-dpo"]


class Page(HTMLParser):
    """Collects tags with their attributes, and text outside <style>."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return fabricate_run(tmp_path_factory.mktemp("run") / "whole")


@pytest.fixture(scope="module")
def html(run_folder):
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    return path.read_text(encoding="utf-8")


def loads_nothing(html):
    """What would make a browser run or fetch something."""
    page = Page(html)
    found = [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "img", "object", "embed", "form", "base")]
    for _, attributes in page.tags:
        found += [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        found += [value for name, value in attributes.items() if "href" in name and not value.startswith("#")]
        found += [value for value in attributes.values() if value and "url(" in value and "url(#" not in value]
    return found + re.findall(r"@import|url\((?!#)", "".join(re.findall(r"<style>(.*?)</style>", html, re.S)))


def test_all_sections_are_there(html):
    page = Page(html)
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {"line", "stages", "compression", "samples", "curves", "data", "tokenizer", "lineage", "recipe"} <= ids
    assert {f"stage-{name}" for name in STAGES} <= ids
    assert page.open == []
    for text in ("1.482", "57.0 %", "8,818 documents", "0123456789ab", "near_duplicate", "412 clusters", "steps: 1200"):
        assert text in page.text, text


def test_the_file_stands_alone_and_is_small(html, run_folder):
    assert loads_nothing(html) == []
    assert "default-src 'none'" in html
    assert (run_folder / "report.html").stat().st_size < 3_000_000


@pytest.mark.parametrize("planted", ["<script>x</script>", '<img src="x">', '<a href="http://x">x</a>', '<p onclick="x">x</p>'])
def test_the_check_for_standing_alone_can_fail(html, planted):
    assert loads_nothing(html.replace("</main>", planted + "</main>"))


HOSTILE = "</pre></td></style><script>alert(1)</script><img src=x onerror=alert(2)>" + "\"'`{{ 7*7 }}{% raw %}\0\u202e\ud800"


def test_text_of_models_and_documents_cannot_inject(tmp_path):
    path = write_report(fabricate_run(tmp_path / "run", text=HOSTILE.replace("\ud800", "")))
    html = path.read_text(encoding="utf-8")
    assert loads_nothing(html) == []
    assert html.count("&lt;script&gt;alert(1)") >= 5  # samples, prompts, examples, clusters, tokens: all shown as text
    assert "{{ 7*7 }}" in html
    assert "\x00" not in html and "\u202e" not in html


def test_lone_surrogates_and_control_characters_become_visible():
    assert formats.visible(HOSTILE)[-3:] == "␀\ufffd?"
    assert formats.visible("a\tb\n") == "a\tb\n"
    assert formats.visible("é中👩‍💻") == "é中👩‍💻"


@pytest.mark.parametrize("until", [*STAGES[:6], "evaluate-initial", "evaluate-sft"])
def test_a_run_that_stopped_early_still_has_a_report(tmp_path, until):
    html = write_report(fabricate_run(tmp_path / "run", until=until)).read_text(encoding="utf-8")
    assert "Not run yet:" in html
    assert Page(html).open == []


def test_a_run_without_any_finished_stage(tmp_path):
    folder = fabricate_run(tmp_path / "run", until="data")
    (folder / "data" / "manifest.json").unlink()
    assert "not run" in write_report(folder).read_text(encoding="utf-8")


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_damaged_tokenizer_is_named_and_costs_only_its_section(tmp_path):
    folder = fabricate_run(tmp_path / "run")
    (folder / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8")
    html = write_report(folder).read_text(encoding="utf-8")
    assert "tokenizer.json" in html and "What it writes" in html


@pytest.mark.parametrize(("right", "state"), [(171, "improved"), (40, "unclear"), (36, "failed"), (20, "failed")])
def test_verdict_of_a_rate(tmp_path, right, state):
    """36 of 300 were right before."""
    run = read_run(fabricate_run(tmp_path / "run", sft_right=right))
    found = {verdict.stage: verdict for verdict in verdicts(run)}
    assert found["sft"].state == state
    assert found["pretrain"].state == "improved"


def test_what_did_not_improve_is_red_with_a_sentence(tmp_path):
    html = write_report(fabricate_run(tmp_path / "run", sft_right=20)).read_text(encoding="utf-8")
    assert 'class="verdict failed"' in html and 'class="box failed"' in html
    assert "sft did not raise the share of held-out tasks right" in html


def test_nothing_is_red_when_all_improved(html):
    assert 'class="verdict failed"' not in html and 'class="box failed"' not in html


def test_a_preference_stage_is_judged_by_its_own_rule(tmp_path):
    folder = fabricate_run(tmp_path / "run")
    manifest = read_json(folder / "dpo" / "manifest.json")
    difference = {"mean": 0.1, "low": 0.05, "high": 0.15}
    manifest["metrics"]["rule_rate"] = {"before": rate(100, 300), "after": rate(130, 300), "difference": difference}
    write_json(folder / "dpo" / "manifest.json", manifest)
    verdict = verdicts(read_run(folder))[-1]
    assert (verdict.metric, verdict.state) == ("held-out answers that keep the rule", "improved")
    assert "+5.0 … +15.0" in verdict.change


def test_newcombe_interval_of_a_published_example():
    """Newcombe 1998, table II (a): 56/70 against 48/80, method 10: 0.0524 to 0.3339."""
    low, high = difference_interval(rate(48, 80), rate(56, 70))
    assert low == pytest.approx(0.0524, abs=2e-4)
    assert high == pytest.approx(0.3339, abs=2e-4)


def test_matrix_has_a_column_for_each_model_and_colours_what_is_beyond_chance(run_folder):
    table = matrix(read_run(run_folder))
    assert table.columns == ["untrained", "pretrain", "sft", "dpo"]
    rows = dict(table.rows)
    assert [cell.state for cell in rows["bits per byte · all"]] == ["", "better", "worse", ""]
    assert [cell.state for cell in rows["tasks right"]] == ["", "", "better", ""]


def test_compression_says_who_won(run_folder, tmp_path):
    found = compression(read_run(run_folder))
    assert (found.model, found.lost, found.beaten, found.same_bytes) == ("pretrain", [], 3, True)
    values = [bar.value for bar in found.bars]
    assert values == sorted(values) and found.bars[-1].share == 1.0
    folder = fabricate_run(tmp_path / "run")
    manifest = read_json(folder / "baselines" / "manifest.json")
    manifest["metrics"] |= {"xz": {"all": 1.2}, "held_out": {"fingerprint": "another"}}
    write_json(folder / "baselines" / "manifest.json", manifest)
    found = compression(read_run(folder))
    assert found.lost == ["xz −9 (1.200)"] and not found.same_bytes
    assert "different held-out text" in write_report(folder).read_text(encoding="utf-8")


def test_funnel_conserves_documents_and_bytes(run_folder):
    view = funnel(read_run(run_folder).data_report)
    assert view.read.documents == view.kept.documents + sum(each.amount.documents for each in view.removed)
    assert view.read.bytes == view.kept.bytes + sum(each.amount.bytes for each in view.removed)


def test_log_of_a_resumed_run_counts_the_last_line_of_a_step_and_skips_a_torn_one(tmp_path):
    folder = fabricate_run(tmp_path / "run")
    path = folder / "sft" / "logs" / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    stage = next(stage for stage in read_run(folder).stages if stage.name == "sft")
    assert [line["step"] for line in stage.log] == [1, 2]
    assert "NaN" not in write_report(folder).read_text(encoding="utf-8")


def test_chart_keeps_every_bucket_mean_and_extreme():
    points = [(float(x), float(x % 10)) for x in range(1000)]
    buckets = bucketed(points, 100)
    assert len(buckets) == 100
    assert {bucket[1:] for bucket in buckets} == {(4.5, 0.0, 9.0)}
    assert line_chart("nothing", [Series("empty", [])]) is None
    assert line_chart("one point", [Series("one", [(5.0, 2.0)])]).series[0].line.startswith("M")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (1.2e-4, 3e-3), (5, 5.0001), (0, 2.4e9)])
def test_ticks_are_round_inside_and_not_too_many(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_ticks_that_are_close_together_read_differently():
    """Losses near ln 2 were once labelled 0.693, 0.693, 0.692, 0.692."""
    chart = line_chart("loss", [Series("loss", [(1.0, 0.6931), (2.0, 0.6921), (3.0, 0.6914)])])
    texts = [tick.text for tick in chart.y_ticks]
    assert len(texts) >= 3 and len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (formats.seconds, 0.42, "0.4 s"), (formats.seconds, 59.7, "1 min 00 s"), (formats.seconds, 3725, "1 h 2 min"),
        (formats.byte_count, 11_800_000, "11.8 MB"), (formats.count, 4096, "4,096"), (formats.count, None, "–"),
        (formats.significant, 0.0003, "0.0003"), (formats.significant, -12_345, "−12.3 k"), (formats.signed, -0.0001, "±0.000"),
        (formats.percent, 0.4567, "45.7 %"),
    ],
)  # fmt: skip
def test_numbers_as_a_person_reads_them(form, value, text):
    assert form(value) == text


def keep_answers(folder, name, right):
    """Write which of 300 tasks an evaluation had right, as evaluations do."""
    rows = [{"id": str(task), "kind": "parameters", "correct": task in right} for task in range(300)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"evaluate-{name}" / "tasks.jsonl").write_text(text, encoding="utf-8")


def test_difference_is_paired_where_the_answers_were_kept(tmp_path):
    """12 more of 300 right and none lost is beyond chance; two separate intervals could not tell."""
    run = fabricate_run(tmp_path / "run", sft_right=48)
    assert {verdict.stage: verdict.state for verdict in verdicts(read_run(run))}["sft"] == "unclear"
    keep_answers(run, "pretrain", range(36))
    keep_answers(run, "sft", range(48))
    verdict = next(verdict for verdict in verdicts(read_run(run)) if verdict.stage == "sft")
    assert verdict.state == "improved" and verdict.change.startswith("+4.0 points (95 %: +2.0")


def test_report_of_a_real_run(smoke_run):
    """The run writes its report, and every section finds its figures where the stages really put them."""
    folder = smoke_run / "runs" / "quickstart"
    html = (folder / "report.html").read_text(encoding="utf-8")
    page, run = Page(html), read_run(folder)
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {"line", "stages", "compression", "samples", "curves", "data", "tokenizer", "lineage", "recipe"} <= ids
    assert page.open == [] and loads_nothing(html) == []
    assert [verdict.stage for verdict in verdicts(run)] == ["pretrain", "sft", "dpo"]
    assert verdicts(run)[0].state == "improved"
    assert len(compression(run).bars) == 8 and compression(run).same_bytes
    view = funnel(run.data_report)
    removed = sum(each.amount.bytes for each in view.removed)
    assert view.read.bytes == view.kept.bytes + removed + view.edited_away_bytes > 0
