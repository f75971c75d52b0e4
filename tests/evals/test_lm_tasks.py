"""The tasks that evals.lm_tasks writes: the same items each time, asked as lm-eval asks them."""

import json

import pytest
import yaml

from evals.lm_tasks import PREFIX, TASKS, choose, guess, main, write_tasks


@pytest.fixture
def data(tmp_path):
    """A folder with a few items of each task."""
    for folder in ("tasks", "blimp"):
        (tmp_path / folder).mkdir()
    for task in TASKS.keys() - {"blimp", "winogrande"}:
        lines = [{"query": f"{task} {n}?", "choices": ["a", f"b {n}"], "gold": n % 2}
                 for n in range(20)]  # fmt: skip
        (tmp_path / "tasks" / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"context_options": [f"A {n}", f"B {n}"], "continuation": "was.", "gold": 1}
             for n in range(20)]  # fmt: skip
    (tmp_path / "tasks" / "winogrande.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("one", "two"):
        lines = [{"sentence_good": f"{name} {n}", "sentence_bad": f"{n} {name}"} for n in range(20)]
        (tmp_path / "blimp" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_the_same_items_each_time_and_as_many_of_each_set(data):
    for task in TASKS:
        chosen = choose(data, task, 6)
        assert chosen == choose(data, task, 6)
        assert len(chosen) == (12 if task == "blimp" else 6)
    firsts = [item["sentence_good"].split()[0] for item in choose(data, "blimp", 6)]
    assert firsts == ["one"] * 6 + ["two"] * 6
    assert len(choose(data, "piqa", 100)) == 20


def test_what_one_answer_for_all_comes_to(data):
    assert guess("piqa", [{"gold": 1}, {"gold": 0}, {"gold": 1}]) == pytest.approx(2 / 3)
    assert guess("winogrande", choose(data, "winogrande", 6)) == 1
    assert guess("blimp", choose(data, "blimp", 6)) == 0.5
    file = data / "found.json"
    main(data=data, items=6, json_file=file)
    assert json.loads(file.read_text())["guess"].keys() == TASKS.keys()


def test_lm_eval_asks_as_it_should(data, tmp_path):
    from lm_eval.tasks import TaskManager

    out = tmp_path / "out"
    out.mkdir()
    write_tasks(data, out, 2)
    names = [PREFIX + task for task in TASKS]
    tasks = TaskManager(include_path=str(out), include_defaults=False).load(names)["tasks"]
    asked = {}
    for name, task in tasks.items():
        task.build_all_requests(rank=0, world_size=1)
        asked[name.removeprefix(PREFIX)] = [request.args for request in task.instances]
    item = choose(data, "arc_easy", 2)[0]
    assert asked["arc_easy"][:2] == [
        (f"{item['query']}\nAnswer:", f" {choice}") for choice in item["choices"]
    ]
    item = choose(data, "winogrande", 2)[0]
    assert asked["winogrande"][:2] == [(context, " was.") for context in item["context_options"]]
    item = choose(data, "blimp", 2)[0]
    assert asked["blimp"][:2] == [("", item["sentence_good"]), ("", item["sentence_bad"])]
    assert yaml.safe_load((out / "piqa.yaml").read_text())["test_split"] == "test"


def test_what_is_missing_is_named(data, tmp_path):
    (data / "tasks" / "piqa.jsonl").unlink()
    with pytest.raises(SystemExit, match="piqa.jsonl does not exist; --data should be"):
        choose(data, "piqa", 3)
    with pytest.raises(SystemExit, match="mine=.* should be NAME=DIRECTORY, of a model"):
        main([f"mine={tmp_path}"], data)
