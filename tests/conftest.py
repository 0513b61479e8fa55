"""One Ray for the session, and teachers whose answers are known by hand."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fault_table
import fsspec
import pytest
from fsspec import AbstractFileSystem

if TYPE_CHECKING:
    from faulty import Corpus
    from s3_server import Server

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")  # a checkpoint costs as much, else two seconds
# what tests hand to Ray's workers may stand in modules beside this one
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH"))))
SEEN: dict[tuple[str, str], str] = {}  # what became of (fault, stage)
TOLD: list[str] = []  # figures to be read at the end


@pytest.fixture
def outcome() -> Callable[[str, str, str], None]:
    """Note what became of a fault in a stage, and hold it against the README."""

    def note(fault: str, stage: str, found: str) -> None:
        SEEN[fault, stage] = found
        assert fault_table.in_readme().get((fault, stage)) == found

    return note


@pytest.fixture
def tell() -> Callable[[str], None]:
    """Print a line at the end of all tests."""
    return TOLD.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SEEN:
        terminalreporter.section("faults")
        terminalreporter.write_line(fault_table.table(SEEN))
    for line in TOLD:
        terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """After a whole run of all tests, the README must not claim more than they have seen."""
    chosen = session.config.option
    whole = not (chosen.markexpr or chosen.keyword or chosen.file_or_dir)
    if whole and exitstatus == 0 and fault_table.in_readme() != SEEN:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.get_terminal_writer().line("the README's table of faults holds cells that no test has seen")


@pytest.fixture
def memory() -> Iterator[AbstractFileSystem]:
    """The store in memory, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator["Server"]:
    """A server that this process and those that it starts take for S3, with an empty bucket."""
    import s3fs
    from s3_server import BUCKET, KEY, SECRET, Server

    from msense.io import filesystems

    server = Server()
    given = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    for name, value in (given | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "3"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3fs.S3FileSystem.clear_instance_cache()
    server.empty()
    filesystems.filesystem(BUCKET)[0].mkdir("bucket")
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """The Ray that all tests share."""
    from msense.runtime.ray_executor import RayExecutor

    RayExecutor.connect(workers=3)
    import ray as ray_module

    yield
    ray_module.shutdown()


def _write_settings(folder: Path, pooling: str | None, prompt: str | None) -> None:
    """Make a sentence-transformers folder of a teacher's."""
    if pooling:
        modules = [{"name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        modules.append({"name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
        (folder / "1_Pooling").mkdir()
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    if prompt:
        settings = {"prompts": {"query": prompt}, "default_prompt_name": "query"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a small random teacher into a folder.

    kind "bert" (or "roberta", "t5") has [CLS] and [SEP]; "llama" a BOS and nothing else, and its layer 0 is its
    embedding table, so that every occurrence of a token has the same, known embedding. `pooling` writes
    sentence-transformers settings.
    """

    def make(kind: str = "bert", pooling: str | None = None, prompt: str | None = None) -> Path:
        import torch
        from tiny import WORDS
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
        from transformers import (
            BertConfig,
            BertModel,
            LlamaConfig,
            LlamaModel,
            PreTrainedTokenizerFast,
            RobertaConfig,
            RobertaModel,
            T5Config,
            T5Model,
        )

        folder = tmp_path_factory.mktemp(f"{kind}-teacher")
        special = ["<pad>", "<unk>", "<s>"] if kind == "llama" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        vocabulary = {word: number for number, word in enumerate([*special, *WORDS, "run", "##ning", "##s", *".,!"])}
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token=special[1]))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        names = {"pad_token": special[0], "unk_token": special[1]}
        sizes = {
            "vocab_size": len(vocabulary),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        t5 = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32}
        torch.manual_seed(0)
        if kind != "llama":
            backend.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
            )
            names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
            model = {
                "bert": lambda: BertModel(BertConfig(**sizes, max_position_embeddings=64, initializer_range=0.5)),
                "roberta": lambda: RobertaModel(RobertaConfig(**sizes, max_position_embeddings=64, pad_token_id=0)),
                "t5": lambda: T5Model(T5Config(vocab_size=len(vocabulary), **t5)),
            }[kind]()
        else:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
            names |= {"bos_token": "<s>"}
            model = LlamaModel(LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.5))
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names).save_pretrained(folder)
        _write_settings(folder, pooling, prompt)
        return folder

    return make


class Remote:
    """Stands for what `ray.remote` returns: calls go straight through."""

    def __init__(self, target: Callable) -> None:
        self.target = target

    def options(self, **_: object) -> "Remote":
        return self

    def remote(self, *arguments: object, **named: object) -> object:
        result = self.target(*arguments, **named)
        return Actor(result) if isinstance(self.target, type) else result


class Actor:
    """Stands for an actor's handle."""

    def __init__(self, target: object) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Remote:
        return Remote(getattr(self._target, name))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a build without Ray, in this process and in small pieces: many blocks, units and shards of a small corpus."""
    import json as json_module

    import ray as ray_module

    from msense.corpus import chunking
    from msense.pipelines import build, dry_run
    from msense.pipelines import distill as distill_module
    from msense.run import resume
    from msense.runtime.executor import _merge, guard, unwrap
    from msense.runtime.resources import Resources
    from msense.stages import cluster, distributed_kmeans, embed, exemplars, label, passages, plan, sense_counts, train

    def run(work: Callable, items: list) -> Iterator[dict]:
        for item in items:
            yield unwrap(guard(work, json_module.loads(json_module.dumps(item))))

    def reduce(name: str, work: Callable, slices: list, resources: object, *common: object) -> object:
        results = [work(item, *common) for item in slices]
        return _merge(*results)

    fakes = {
        "connect": lambda workers=None, gpus_per_actor=1.0: Resources(
            actors=workers or 2, tasks=workers or 2, device="cpu"
        ),
        "map_data": lambda name, work, items, resources: run(work, items),
        "map_actors": lambda name, actor, arguments, items, resources: run(actor(**arguments), items) if items else (),
        "map_tasks": lambda name, work, items, resources, *common, needs=None: run(
            lambda item: work(item, *common), items
        ),
        "reduce_tasks": reduce,
        "run_task": lambda work, *arguments, device="cpu": work(*arguments),
        "submit": lambda work, *arguments: work(*arguments),
        "get": lambda value: value,
    }
    from msense.evaluation import run as evaluation

    stages = (cluster, evaluation, exemplars, label, distributed_kmeans, passages, plan, resume, sense_counts)
    for module in (build, train, distill_module, dry_run, *stages):
        for name, fake in fakes.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fake)

    monkeypatch.setattr(ray_module, "remote", Remote)
    monkeypatch.setattr(ray_module, "put", lambda value: value)
    monkeypatch.setattr(ray_module, "kill", lambda actor: None)
    monkeypatch.setattr(chunking, "BLOCK_TOKENS", 1500)
    monkeypatch.setattr(embed, "UNIT_BYTES", (60_000, 60_000))
    monkeypatch.setattr(label, "UNIT_BYTES", (4_000, 4_000))
    monkeypatch.setattr(embed, "SHARD_BYTES", (60_000, 60_000))


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Patches that a test may undo without undoing those of its fixtures."""
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture
def made(tmp_path: Path, make_teacher: Callable[..., Path]) -> "Corpus":
    """A corpus and a teacher to build from, again and again."""
    from faulty import Corpus

    return Corpus(tmp_path, make_teacher("bert"))


@pytest.fixture
def whole(made: "Corpus") -> "Corpus":
    """With "whole", a finished run that keeps all; and "stopped", the same, stopped just before it dropped contexts."""
    from faulty import ALL

    made.build("whole", keep=ALL)
    made.stop_at("msense.pipelines.build._drop_intermediates", "stopped", keep=ALL)
    return made


@pytest.fixture(scope="session")
def teacher(make_teacher: Callable[..., Path]) -> Path:
    """A small teacher that nobody changes."""
    return make_teacher("bert")


@pytest.fixture(scope="session", params=["static", "layers:1"])
def shipped_student(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A shipped student that nobody changes: its encoder, the student, its dictionary, and the folder."""
    from students import shipped

    from msense import SenseEncoder

    folder = tmp_path_factory.mktemp("shipped") / "student"
    student, dictionary = shipped(teacher, folder, request.param)
    return SenseEncoder.from_pretrained(folder), student, dictionary, folder
