"""MT-Bench: answers that resume, and a judge behind a real HTTP server that misbehaves in every known way."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from relinear.distill.errors import RunFailed, UserError
from relinear.distill.teacher import load_teacher
from relinear.eval import endpoint as endpoints
from relinear.eval import judge_prompts, mt_bench
from relinear.eval.endpoint import Endpoint, Unanswered, chat_url
from relinear.eval.lines import Lines
from relinear.eval.mt_bench import mt_bench_suite

KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server. `script` holds what to reply next, (status, headers, body); then marks of 7."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list = []
        self.requests: list = []
        self.default = "Fair enough. Rating: [[7]]"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers `POST /v1/chat/completions`."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, self.headers.get("authorization"), body))
        reply = self.server.script.pop(0) if self.server.script else (200, {}, completion(self.server.default))
        status, headers, text = reply(body) if callable(reply) else reply
        if status == 0:  # hang up
            self.close_connection = True
            return
        if self.path != "/v1/chat/completions":
            status, text = 404, "no such route"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args) -> None:
        """Quiet."""


def completion(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def server():
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(endpoints.Endpoint.__init__, "__defaults__", ("OPENAI_API_KEY", endpoints.TRIES, waited.append))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return waited


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return load_teacher(make_teacher("llama", num_hidden_layers=1))


@pytest.fixture
def questions(tmp_path):
    lines = [
        {"question_id": 1, "category": "writing", "turns": ["Write of a dog.", "Now shorter."]},
        {"question_id": 2, "category": "math", "turns": ["1+1?", "And 2+2?"], "reference": ["It is 2.", "It is 4."]},
        {"question_id": 3, "category": "coding", "turns": ["Print x."]},
    ]
    path = tmp_path / "question.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def ask(server, tries=4):
    waited: list[float] = []
    one = Endpoint(server.url, "judge", tries=tries, sleep=waited.append)
    try:
        return one.ask([{"role": "user", "content": "hello"}]), waited
    finally:
        one.close()


def test_errors_are_waited_out(server):
    server.script = [
        (429, {"retry-after": "7"}, "slow down"),
        (500, {}, "broken"),
        (200, {}, "<html>not json</html>"),
        (200, {}, json.dumps({"choices": []})),
        (0, {}, ""),
    ]
    said, waited = ask(server, tries=6)
    assert said == "Fair enough. Rating: [[7]]" and len(server.requests) == 6
    assert waited[0] == 7  # what the server asked for
    assert waited[1] >= 2 and waited[2] >= 4 and waited[3] >= 8  # then twice as long each time
    assert all(later <= endpoints.LONGEST_WAIT for later in waited)
    body = server.requests[0][2]
    assert (body["model"], body["temperature"], body["messages"][0]["content"]) == ("judge", 0, "hello")


def test_patience_ends(server):
    server.script = [(503, {}, "busy")] * 9
    with pytest.raises(Unanswered, match=r"no usable reply in 3 tries \(the last: status 503\)"):
        ask(server, tries=3)
    assert len(server.requests) == 3
    server.script = [(200, {}, completion("  "))] * 2
    with pytest.raises(Unanswered, match="no chat completion"):
        ask(server, tries=2)


def test_nobody_there():
    one = Endpoint("http://127.0.0.1:1", "judge", tries=2, sleep=lambda seconds: None)
    with pytest.raises(Unanswered, match="ConnectError"):
        one.ask([])
    one.close()


@pytest.mark.parametrize(
    ("status", "words"), [(401, "export OPENAI_API_KEY"), (404, "base url"), (400, "the model 'judge'")]
)
def test_a_refusal_is_the_users_and_never_shows_the_key(server, monkeypatch, status, words):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script = [(status, {}, f"wrong key {KEY}")]
    with pytest.raises(UserError, match=words) as caught:
        ask(server)
    assert KEY not in str(caught.value) and len(server.requests) == 1
    assert server.requests[0][1] == f"Bearer {KEY}"


def test_servers_that_take_other_parameters(server):
    server.script = [
        (400, {}, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        (400, {}, "Unsupported value: 'temperature' does not support 0"),
    ]
    assert ask(server)[0].endswith("[[7]]")
    assert sorted(server.requests[-1][2]) == ["max_completion_tokens", "messages", "model"]


def test_the_key_stays_at_home(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    far = Endpoint("http://judge.example/v1", "judge")
    assert "authorization" not in far._client.headers and "not sent" in far.notes[0]
    for url in ("https://judge.example", "http://localhost:8000"):
        near = Endpoint(url, "judge")
        assert near._client.headers["authorization"] == f"Bearer {KEY}" and near.notes == []
        near.close()
    far.close()


def test_urls():
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/chat/completions"):
        assert chat_url(url) == "http://a:1/v1/chat/completions"
    assert chat_url("https://a/api/v1/") == "https://a/api/v1/chat/completions"
    with pytest.raises(UserError, match="expected an http or https url"):
        chat_url("localhost:8000")


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Good. Rating: [[8]]", 8), ("[[5]] is an example; mine: [[9.5]]", 9.5), ("Rating: [6]", 6), ("[[ 7/10 ]]", 7),
        ("Rating: 8", None), ("[[11]]", None), ("[[0]]", None), ("", None),
    ],
)  # fmt: skip
def test_marks(text, mark):
    assert judge_prompts.rating(text) == mark


def test_the_judge_sees_what_the_method_says():
    math = {"category": "math", "turns": ["1+1?", "2+2?"], "reference": ["two", "four"]}
    name, (system, user) = judge_prompts.messages(math, ["zwei"], 1)
    assert name == "single-reference" and system["role"] == "system" and "[[rating]]" in user["content"]
    assert all(word in user["content"] for word in ("1+1?", "zwei", "two")) and "2+2?" not in user["content"]
    name, (_, user) = judge_prompts.messages(math, ["zwei", "vier"], 2)
    assert name == "multi-reference"
    assert all(word in user["content"] for word in ("1+1?", "2+2?", "zwei", "vier", "two", "four", "second question"))
    plain = {"category": "writing", "turns": ["Write."], "reference": ["unused"]}
    name, (_, user) = judge_prompts.messages(plain, ["Text."], 1)
    assert name == "single" and "unused" not in user["content"]
    assert judge_prompts.messages({"category": "coding", "turns": ["x"]}, ["y"], 1)[0] == "single"


def test_the_suite_and_its_files(server, waits, teacher, questions, tmp_path):
    server.script = [(200, {}, completion("no mark"))] * 3 + [(500, {}, ""), (200, {}, completion("[[4]]"))]
    seen = []
    settings = {"questions": questions, "endpoint": server.url, "judge": "the/judge", "max_new_tokens": 6}
    found = mt_bench_suite(
        teacher.model, teacher.tokenizer, teacher.model, folder=tmp_path, progress=lambda *a: seen.append(a), **settings
    )
    assert seen[-1] == (20, 20)
    # the first turn's verdict never has a mark; the second is 4, the other three of the student 7
    assert found["student"]["score"] == pytest.approx((4 + 7 * 3) / 4) and found["student"]["n"] == 4
    assert found["student"]["turns"]["2"] == {"score": pytest.approx(5.5), "stderr": pytest.approx(1.5), "n": 2}
    assert found["teacher"]["score"] == 7 and found["teacher"]["n"] == 5
    assert found["categories"]["writing"]["student"] == {"score": 4, "stderr": None, "n": 1}
    assert found["answers"]["student"]["unmarked"] == 1 and "no mark" in found["notes"][-1]
    assert found["judge"] == "the/judge" and len(waits) == 1

    answers = sorted((tmp_path / "model_answer").glob("*.jsonl"))
    verdicts = sorted((tmp_path / "model_judgment").glob("*.jsonl"))
    assert [path.name.split("-")[0] for path in answers] == ["student", "teacher"]
    assert [path.name.split("_")[0] for path in verdicts] == ["the-judge", "the-judge"]
    records = [json.loads(line) for line in answers[0].read_text().splitlines()]
    assert [record["question_id"] for record in records] == [1, 2, 3]
    assert [len(record["choices"][0]["turns"]) for record in records] == [2, 2, 1]
    judged = [json.loads(line) for line in verdicts[0].read_text().splitlines()]
    assert [(one["question_id"], one["turn"], one["score"]) for one in judged][:2] == [(1, 1, -1), (1, 2, 4)]
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*.json*"))
    # the same weights under both names: the same answers
    assert [r["choices"] for r in records] == [
        json.loads(line)["choices"] for line in answers[1].read_text().splitlines()
    ]


def test_it_goes_on_where_it_was(server, waits, teacher, questions, tmp_path, monkeypatch):
    settings = {"questions": questions, "folder": tmp_path, "max_new_tokens": 5}
    first = mt_bench_suite(teacher.model, teacher.tokenizer, **settings)
    assert first["student"] is None and first["judge"] is None and "answers only" in first["notes"][0]
    (path,) = (tmp_path / "model_answer").glob("*.jsonl")
    kept = path.read_bytes()
    lines = kept.splitlines(keepends=True)
    path.write_bytes(lines[1] + lines[0][:25])  # killed while writing an answer, one that is sampled

    said = []
    whole = mt_bench._say
    monkeypatch.setattr(mt_bench, "_say", lambda *given: (said.append(given[2]["question_id"]), whole(*given))[1])
    server.script = [(200, {}, completion("[[3]]"))] * 2 + [(503, {}, "")] * endpoints.TRIES
    judging = settings | {"endpoint": server.url, "judge": "j"}
    with pytest.raises(RunFailed, match=r"2 verdicts on student-.* are kept: run the same command again"):
        mt_bench_suite(teacher.model, teacher.tokenizer, **judging)
    assert said == [1, 1, 3]  # only what was lost

    def turns(data):
        records = map(json.loads, data.splitlines())
        return {record["question_id"]: record["choices"] for record in records}

    assert turns(path.read_bytes()) == turns(kept)  # sampled answers too: the seed is the question's
    server.requests.clear()
    found = mt_bench_suite(teacher.model, teacher.tokenizer, **judging)
    assert len(server.requests) == 3 and found["student"]["n"] == 5
    assert found["student"]["score"] == pytest.approx((3 + 3 + 7 * 3) / 5)
    # other settings are other answers, and leave these alone
    mt_bench_suite(teacher.model, teacher.tokenizer, **settings | {"seed": 1})
    assert len(list(path.parent.glob("*.jsonl"))) == 2 and turns(path.read_bytes()) == turns(kept)


def test_an_answer_without_room_is_cut_and_said(teacher, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question_id": "a", "category": "math", "turns": ["dog " * 200, "Next?"]}) + "\n")
    found = mt_bench_suite(teacher.model, teacher.tokenizer, questions=path, max_new_tokens=8)
    assert found["answers"]["student"]["cut"] == 2 and any("cut by the model's context" in n for n in found["notes"])


def test_wrong_input(teacher, questions, byte_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no chat template.*--suite generation"):
        mt_bench_suite(teacher.model, byte_tokenizer(), questions=questions)
    with pytest.raises(UserError, match="--judge MODEL"):
        mt_bench_suite(teacher.model, teacher.tokenizer, questions=questions, endpoint="http://localhost:1")
    with pytest.raises(UserError, match="cannot be read"):
        mt_bench_suite(teacher.model, teacher.tokenizer, questions=tmp_path / "none")
    for text in ('{"question_id": 1}', '{"question_id": 1, "category": "a", "turns": []}', "{"):
        (tmp_path / "bad.jsonl").write_text("\n" + text + "\n")
        with pytest.raises(UserError, match=r"bad\.jsonl:2: no question"):
            mt_bench_suite(teacher.model, teacher.tokenizer, questions=tmp_path / "bad.jsonl")


def test_kept_lines(tmp_path):
    path = tmp_path / "a" / "b.jsonl"
    with Lines(path) as lines:
        lines.append({"x": 1})
        lines.append({"x": "ü"})
    path.write_bytes(path.read_bytes() + b'{"x": 3')
    with Lines(path) as lines:
        assert [record["x"] for record in lines.records] == [1, "ü"]
        lines.append({"x": 4})
    assert [json.loads(line)["x"] for line in path.read_text().splitlines()] == [1, "ü", 4]
    path.write_text("{}\nnot json\n")
    with pytest.raises(UserError, match=r"b\.jsonl:2: not JSON"):
        Lines(path)
    path.write_bytes(b'{"cut"')
    with Lines(path) as lines:
        assert lines.records == []
    assert path.read_bytes() == b""


def test_the_real_questions(shared):
    found = mt_bench.read_questions(shared / "evals" / "mt_bench" / "question.jsonl")
    assert len(found) == 80 and all(len(question["turns"]) == 2 for question in found)
    referred = [q for q in found if "reference" in judge_prompts.messages(q, ["x", "y"], 2)[0]]
    assert {q["category"] for q in referred} == set(judge_prompts.WITH_REFERENCE)
