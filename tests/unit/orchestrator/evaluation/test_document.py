import dataclasses
import json

import pytest
from evaluations import evaluation, guarantee, leakage, member, subject, task_record

from orchestrator.evaluation.document import Figures, page_of, tables_of
from orchestrator.report.page import render


def findings(of):
    return {finding.text: finding.mark for finding in page_of(of, Figures()).findings}


def found(of, words):
    texts = {text: mark for text, mark in findings(of).items() if words in text}
    assert len(texts) == 1, texts
    return texts.popitem()


def test_the_page_begins_with_what_is_guaranteed_and_says_so_in_a_word():
    page = page_of(evaluation(), Figures())
    assert page.statements[0].text == guarantee().statement()
    assert page.statements[0].strength == "guaranteed"
    html = render(page)
    assert html.index("(8.00, 0.001)-differential privacy") < html.index("Table 1")


def test_a_task_that_promises_something_else_than_the_encoder_gets_its_own_statement():
    plain = guarantee(None)
    changed = subject()
    changed.tasks["eyes"] = task_record("eyes", promise=plain)
    statements = page_of(evaluation(subject=changed), Figures()).statements
    assert [(s.subject, s.strength) for s in statements] == [("Encoder 3", "guaranteed"), ("Task eyes", "none")]


def test_the_worst_leak_is_a_finding_with_its_numbers():
    text, mark = found(evaluation(), "The worst leak")
    assert "the feature of pose reads eyes at 97.0 %" in text
    assert "+47.0 points" in text and "(50.0 %)" in text
    assert mark == "bad"


def test_a_quiet_swap_test_beside_a_loud_attacker_is_pointed_out_and_an_honest_one_is_not():
    text, _ = found(evaluation(), "The swap test finds nothing")
    assert "pose on eyes" in text and "eyes on who" in text
    assert "pose on who" not in text


def test_what_is_at_chance_is_named_and_nothing_else():
    text, mark = found(evaluation(), "At chance")
    assert text.endswith("points: pose on who.") and mark == "good"


def test_a_crashed_attacker_is_a_bad_finding_and_no_sign_of_privacy():
    text, mark = found(evaluation(leakage=leakage(crashed=("cnn",))), "crashed")
    assert "cnn on pose, for eyes" in text and mark == "bad"


@pytest.mark.parametrize(("numbers", "mark"), [({}, "neutral"), ({"low": 0.56, "tpr_low": 0.03}, "bad")])
def test_membership_is_bad_only_where_its_intervals_leave_chance_out(numbers, mark):
    assert found(evaluation(membership={"pose": (member(**numbers),)}), "Membership")[1] == mark


def test_the_guard_is_praised_for_the_session_that_it_stopped_alone():
    assert found(evaluation(), "The guard stopped")[1] == "good"
    text, mark = found(evaluation(), "Without the guard")
    assert "19.3 dB, mean image 13.6 dB; encoder live" in text and mark == "neutral"


def test_a_quick_look_says_that_it_claims_nothing():
    assert "--budget full" in found(evaluation(budget="quick"), "quick look")[0]
    assert not [text for text in findings(evaluation()) if "quick look" in text]


def test_every_table_is_on_the_page_with_the_command_that_makes_it_again():
    whole = evaluation()
    page = page_of(whole, Figures())
    assert [s.title for section in page.sections for s in section.sheets] == [s.title for s in tables_of(whole)]
    commands = {section.title: section.command for section in page.sections}
    assert commands["Who was in the training set"] == (
        "python pipelines/evaluate.py --catalog faces --encoder-version 3 --parts membership"
    )


def test_parts_that_were_not_measured_are_not_mentioned():
    page = page_of(evaluation(reconstruction=None, membership=None, hijack=None), Figures())
    assert [section.title for section in page.sections] == ["What each feature tells about what its tenant did not buy"]
    assert not [finding for finding in page.findings if "Membership" in finding.text]


def test_every_number_is_in_the_json_and_it_is_json():
    data = json.loads(json.dumps(evaluation().to_json(), allow_nan=False))
    assert data["leakage"]["rows"][0]["leak"] == pytest.approx(0.97)
    assert data["reconstruction"]["rows"][0]["attacks"][0]["ssim"] == 0.93
    assert data["hijack"][0]["runs"][1]["stopped"] == "no labels"
    assert data["membership"]["pose"][0]["auc"] == 0.51
    assert data["subject"]["encoder"]["guarantee"]["epsilon"] == 8.0


def test_the_name_of_a_users_file_stays_text():
    renamed = dataclasses.replace(subject(), data_name="<script>alert(1)</script>")
    html = render(page_of(evaluation(subject=renamed), Figures()))
    assert "<script>" not in html and "&lt;script&gt;" in html
