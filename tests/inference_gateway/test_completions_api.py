"""/v1/completions, /tokenize and /detokenize."""

from typing import Any

import openai
import pytest

from tests.inference_gateway.conftest import Running
from tests.inference_gateway.test_chat_api import QUESTION

PROMPT = "The red boat lies"


def complete(running: Running, user: str = "alice", **options: Any) -> Any:
    return running.openai(user).completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 8, **options})


def tokens_of(running: Running, **body: Any) -> dict[str, Any]:
    response = running.http("alice").post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_text_and_its_tokens_are_the_same_prompt(running: Running) -> None:
    answer = complete(running)
    ids = tokens_of(running, prompt=PROMPT)["tokens"]
    assert answer.object == "text_completion" and answer.choices[0].finish_reason in ("stop", "length")
    assert complete(running, prompt=ids).choices[0].text == answer.choices[0].text
    assert answer.usage.prompt_tokens == len(ids)


def test_several_prompts_are_answered_in_order_with_n_choices_each(running: Running) -> None:
    first, second = complete(running).choices[0].text, complete(running, prompt="Another").choices[0].text
    assert first != second
    both = complete(running, prompt=[PROMPT, "Another"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [first, first, second, second]
    ids = [tokens_of(running, prompt=one)["tokens"] for one in (PROMPT, "Another")]
    assert [choice.text for choice in complete(running, prompt=ids).choices] == [first, second]
    assert both.usage.prompt_tokens == sum(map(len, ids))


def test_permitted_silos_shape_completions_too(running: Running) -> None:
    assert len({complete(running, user).choices[0].text for user in ("alice", "bob", "carol")}) == 3
    told = complete(running, extra_body={"seqr": {"attribution": True, "silos": ["gamma"]}})
    assert told.model_extra["seqr"]["permitted"] == ["gamma"]
    assert "".join(one["token"] for one in told.choices[0].model_extra["seqr"]["tokens"]) == told.choices[0].text


def test_a_stream_of_completions_says_the_same(running: Running) -> None:
    plain = complete(running, prompt=[PROMPT, "Another"], logprobs=2)
    chunks = list(
        complete(running, prompt=[PROMPT, "Another"], logprobs=2, stream=True, stream_options={"include_usage": True})
    )
    for index in range(2):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(part.text for part in parts) == plain.choices[index].text
        assert parts[-1].finish_reason == plain.choices[index].finish_reason
        offsets = [one for part in parts for one in part.logprobs.text_offset]
        assert offsets == plain.choices[index].logprobs.text_offset
    assert chunks[-1].usage == plain.usage


def test_logprobs_have_the_completions_form(running: Running) -> None:
    answer = complete(running, logprobs=2)
    told = answer.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert all(one < 0 for one in told.token_logprobs)
    assert all(1 <= len(one) <= 2 for one in told.top_logprobs)
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    assert complete(running).choices[0].logprobs is None


def test_stop_n_and_seed_work_as_in_a_chat(running: Running) -> None:
    drawn = {"temperature": 1.3, "seed": 4, "max_tokens": 12}
    two = complete(running, n=2, **drawn)
    assert two.choices[0].text == complete(running, **drawn).choices[0].text != two.choices[1].text
    full = two.choices[0].text
    cut = complete(running, stop=full[3:5], **drawn).choices[0]
    assert cut.text == full[: full.index(full[3:5])] and cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"best_of": 3}, "unsupported_parameter", "best_of"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"messages": QUESTION}, "unsupported_parameter", "messages"),
        ({"tools": [{}]}, "unsupported_parameter", "tools"),
        ({"max_completion_tokens": 5}, "unsupported_parameter", "max_completion_tokens"),
        ({"colour": "red"}, "unknown_parameter", "colour"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": [5, "x"]}, "invalid_value", "prompt.1"),
        ({"prompt": [259]}, "invalid_value", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt.0"),
        ({"prompt": ["x"] * 65}, "invalid_value", "prompt"),
        ({"prompt": {}}, "invalid_value", "prompt"),
        ({"prompt": [True]}, "invalid_value", "prompt.0"),
        ({"logprobs": 21}, "invalid_value", "logprobs"),
        ({"logprobs": True}, "invalid_value", "logprobs"),
        ({"prompt": "x" * 600}, "context_length_exceeded", "prompt"),
        ({"max_tokens": 600}, "context_length_exceeded", "max_tokens"),
        ({"model": "gpt-4"}, "model_not_found", "model"),
        ({"model": "silo:beta"}, "model_not_found", "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_completions_do_not_support_is_refused_by_name(
    running: Running, options: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        complete(running, extra_body=options)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert refused.value.status_code == (404 if code == "model_not_found" else 400)


def test_tokens_of_a_prompt_and_back(running: Running) -> None:
    told = tokens_of(running, model="tiny", prompt="naïve", return_token_strs=True)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) == 6
    assert told["max_model_len"] == 512
    back = running.http("alice").post("/detokenize", json={"model": "tiny", "tokens": told["tokens"]})
    assert back.json() == {"prompt": "naïve"}
    assert tokens_of(running, prompt="")["tokens"] == []
    assert tokens_of(running, prompt="x")["token_strs"] is None


def test_tokens_of_messages_are_those_of_the_chat(running: Running) -> None:
    told = tokens_of(running, messages=QUESTION)
    answer = running.openai("alice").chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)  # type: ignore[arg-type]
    assert told["count"] == answer.usage.prompt_tokens  # type: ignore[union-attr]
    assert tokens_of(running, messages=QUESTION, add_generation_prompt=False)["count"] < told["count"]


@pytest.mark.parametrize(
    ("route", "body", "code"),
    [
        ("/tokenize", {"prompt": "x", "model": "silo:beta"}, "model_not_found"),
        ("/tokenize", {"prompt": "x", "model": "gpt-4"}, "model_not_found"),
        ("/tokenize", {"prompt": ["x"]}, "invalid_value"),
        ("/tokenize", {"prompt": "x", "messages": QUESTION}, "unknown_parameter"),
        ("/tokenize", {"messages": []}, "invalid_value"),
        ("/tokenize", {"prompt": "x", "chat_template": "y"}, "unsupported_parameter"),
        ("/detokenize", {"tokens": [259]}, "invalid_value"),
        ("/detokenize", {"tokens": [-1]}, "invalid_value"),
        ("/detokenize", {"tokens": "x"}, "invalid_value"),
        ("/detokenize", {}, "missing_parameter"),
    ],
)
def test_what_the_tokenizer_cannot_take_is_refused(
    running: Running, route: str, body: dict[str, Any], code: str
) -> None:
    response = running.http("alice").post(route, json=body)
    assert response.json()["error"]["code"] == code and response.status_code in (400, 404)


def test_the_callers_own_silos_are_models_to_the_tokenizer(running: Running) -> None:
    assert tokens_of(running, prompt="x", model="silo:alpha")["count"] == 1
