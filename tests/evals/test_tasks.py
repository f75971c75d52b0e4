"""The lm-eval tasks: their documents, and scores by lm-eval with the transformers backend."""

import math

import pytest

from evals.perplexity import held_out_loss, load_model
from evals.pocket import corpus
from evals.tasks import standard_library


def test_questions_have_one_right_answer():
    documents = standard_library.next_line(count=50, seed=1)["validation"]
    assert documents[:] == standard_library.next_line(count=50, seed=1)["validation"][:]
    assert len(documents) == 50
    held_out = [f"\n{text}\n" for _, text in corpus.files("validation")]
    for document in documents:
        right = document["choices"][document["answer"]]
        assert len(set(document["choices"])) == 4
        assert len({len(c) - len(c.lstrip()) for c in document["choices"]}) == 1
        assert any(f"\n{document['context']}{right}\n" in text for text in held_out)
    assert {document["answer"] for document in documents} == {0, 1, 2, 3}


@pytest.mark.slow
def test_lm_eval_scores_the_pocket_model(pocket, root):
    """Well above chance, and the same bits per byte as the sum of the token losses gives."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        pretrained=str(pocket), dtype="float32", max_length=512, batch_size=8, device="cpu"
    )
    tasks = TaskManager(include_path=str(root / "evals" / "tasks"), include_defaults=False)
    names = ["stdlib_choice", "stdlib_perplexity"]
    scores = lm_eval.simple_evaluate(
        model, tasks=names, task_manager=tasks, limit=60, bootstrap_iters=0
    )["results"]
    assert scores["stdlib_choice"]["acc,none"] > 0.4
    assert scores["stdlib_choice"]["acc_norm,none"] > 0.4

    passages = standard_library.passages(count=64)["validation"]["text"][:60]
    loss = total = 0.0
    dense = load_model(pocket, device="cpu")
    for text in passages:
        length = len(corpus.token_rows([text], model.tokenizer, 2).flatten())
        for_one = held_out_loss(dense, model.tokenizer, [text], context=length, progress=False)
        loss += for_one.loss * for_one.tokens
        total += len(text.encode())
    # windows cut an odd last token off, so the two agree to about one token in three hundred
    assert scores["stdlib_perplexity"]["bits_per_byte,none"] == pytest.approx(
        loss / math.log(2) / total, rel=0.01
    )
