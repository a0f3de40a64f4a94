"""Captions by a model: a tiny BLIP of the real classes, loaded from a folder as a user's would be.

What is asserted is where captions land, what a stopped run leaves, and what is never touched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    LlavaProcessor,
)

from gps_guidance import cli
from gps_guidance.captions import Captioner, CaptionSummary, caption
from gps_guidance.photos.manifest import load_manifest

WORDS = ("a red blue green house car tree tower in the rain at night of and street photo old "
         "stone people walking").split()
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained BLIP of two small layers, with a vocabulary of twenty words."""
    folder = tmp_path_factory.mktemp("blip")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}
    config = BlipConfig(
        text_config={**shape, "vocab_size": len(vocabulary), "encoder_hidden_size": 32,
                     "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0,
                     "max_position_embeddings": 96},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16, image_text_hidden_size=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:  # so that photos get other words
                torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
        bias = model.text_decoder.cls.predictions.bias  # at least a word, and only words
        bias.data[:5] = torch.tensor([-99.0, -99.0, -99.0, 0.0, -99.0])
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer
                  ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def dataset(miniature_dataset: Path, tmp_path: Path) -> Path:
    """Twelve photos without a caption."""
    return Path(shutil.copytree(miniature_dataset, tmp_path / "dataset"))


def run(dataset: Path, model: str, **options: Any) -> CaptionSummary:
    summary = caption(dataset, model, progress=False, **{"batch_size": 4, **options})
    assert summary is not None
    return summary


def captions(dataset: Path) -> dict[str, str | None]:
    rows = load_manifest(dataset).rows
    return dict(zip(rows["id"].to_pylist(), rows["caption"].to_pylist(), strict=True))


def write(dataset: Path, texts: dict[str, str | None]) -> None:
    """Captions as another program may have put them into the manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = load_manifest(dataset).rows
    column = [texts.get(name) for name in rows["id"].to_pylist()]
    place = rows.schema.get_field_index("caption")
    pq.write_table(rows.set_column(place, rows.schema.field(place), pa.array(column, pa.string())),
                   dataset / "manifest.parquet")


def test_captions_land_and_nothing_else_changes(dataset: Path, blip: str) -> None:
    before = load_manifest(dataset).rows
    assert run(dataset, blip) == CaptionSummary(12, 0, 0, 0)
    after = load_manifest(dataset).rows
    assert after.schema.equals(before.schema, check_metadata=True)
    assert after.drop_columns(["caption"]).equals(before.drop_columns(["caption"]))
    texts = captions(dataset)
    assert all(text and set(text.split()) <= set(WORDS) for text in texts.values())
    assert len(set(texts.values())) > 1  # it looks at the photos
    lines = [json.loads(line) for line in (dataset / "captions.jsonl").read_text().splitlines()]
    assert {line["id"]: line["caption"] for line in lines} == texts
    assert {line["model"] for line in lines} == {blip}


def test_a_caption_is_what_the_model_says_of_the_photo(dataset: Path, blip: str) -> None:
    run(dataset, blip, num_beams=1)
    model = BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor = BlipProcessor.from_pretrained(blip)
    for row in load_manifest(dataset).rows.to_pylist()[:3]:
        inputs = processor(images=Image.open(dataset / row["file"]), return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=60)
        assert row["caption"] == processor.decode(tokens[0], skip_special_tokens=True)


def test_the_prompt_is_the_beginning(dataset: Path, blip: str) -> None:
    run(dataset, blip, prompt="a photo of")
    assert all(str(text).startswith("a photo of ") for text in captions(dataset).values())


@pytest.mark.parametrize("stop", ["interrupt", "kill"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    dataset: Path, blip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    """Stopped in the third of six batches; a killed run leaves half a line and no merge."""
    whole = Path(shutil.copytree(dataset, tmp_path / "whole"))
    run(whole, blip, batch_size=2)
    say, calls = Captioner.caption, []

    def stops(self: Captioner, *arguments: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt if stop == "interrupt" else MemoryError
        return say(self, *arguments)

    monkeypatch.setattr(Captioner, "caption", stops)
    with pytest.raises(KeyboardInterrupt if stop == "interrupt" else MemoryError):
        run(dataset, blip, batch_size=2)
    filled = sum(text is not None for text in captions(dataset).values())
    assert filled == (4 if stop == "interrupt" else 0)
    if stop == "kill":
        with open(dataset / "captions.jsonl", "ab") as file:
            file.write(b'{"id": "0123')
    calls.clear()
    monkeypatch.setattr(Captioner, "caption", lambda *a: calls.append(1) or say(*a))
    assert run(dataset, blip, batch_size=2) == CaptionSummary(12, 0, 0, 0)
    assert len(calls) == 4  # the two finished batches are not made again
    for name in ("manifest.parquet", "captions.jsonl"):
        assert (dataset / name).read_bytes() == (whole / name).read_bytes()


def test_what_people_wrote_stays_unless_overwritten(dataset: Path, blip: str) -> None:
    names = list(captions(dataset))
    own: dict[str, str | None] = {names[0]: "my house", names[5]: "my car"}
    write(dataset, own)
    assert run(dataset, blip) == CaptionSummary(10, 2, 0, 0)
    texts = captions(dataset)
    assert {name: texts[name] for name in own} == own
    assert run(dataset, blip, overwrite=True) == CaptionSummary(12, 0, 0, 0)
    texts = captions(dataset)
    assert all(texts[name] and texts[name] != own[name] for name in own)


def test_another_model_or_prompt_replaces_only_when_asked(dataset: Path, blip: str) -> None:
    run(dataset, blip)
    first = captions(dataset)
    assert run(dataset, blip, prompt="old stone") == CaptionSummary(0, 12, 0, 0)
    assert captions(dataset) == first
    run(dataset, blip, prompt="old stone", overwrite=True)
    assert all(str(text).startswith("old stone") for text in captions(dataset).values())


def test_ingested_anew_the_captions_come_from_the_journal(
    dataset: Path, blip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(dataset, blip)
    made = captions(dataset)
    write(dataset, {})
    shutil.rmtree(dataset / "images")  # neither photos nor model are needed
    monkeypatch.setattr(Captioner, "__init__", None)
    assert run(dataset, blip) == CaptionSummary(12, 0, 0, 0)
    assert captions(dataset) == made


def test_an_unreadable_photo_is_counted_and_found_when_it_is_back(
    dataset: Path, blip: str, caplog: pytest.LogCaptureFixture
) -> None:
    row = load_manifest(dataset).rows.to_pylist()[1]
    path = dataset / row["file"]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert run(dataset, blip) == CaptionSummary(11, 0, 1, 0)
    assert captions(dataset)[row["id"]] is None and path.name in caplog.text
    path.write_bytes(data)
    assert run(dataset, blip) == CaptionSummary(12, 0, 0, 0)
    assert captions(dataset)[row["id"]]


def test_the_verb_says_what_it_did(
    dataset: Path, blip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(captions(dataset))
    write(dataset, {names[0]: "my house"})
    assert cli.main(["caption", str(dataset), "--model", blip, "--batch-size", "6",
                     "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"11 captions of {blip} in {dataset}", "       1  kept the caption that they had"]


def test_models_that_cannot_caption_are_refused(
    dataset: Path, blip: str, tmp_path: Path, tiny_sd_model: Path
) -> None:
    with pytest.raises(ValueError, match="cannot be loaded as a captioner"):
        run(dataset, str(tiny_sd_model))
    pickled = Path(shutil.copytree(blip, tmp_path / "pickled"))
    torch.save(BlipForConditionalGeneration.from_pretrained(blip).state_dict(),
               pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights as safetensors"):
        run(dataset, str(pickled))
    coded = Path(shutil.copytree(blip, tmp_path / "coded"))
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="is never run"):
        run(dataset, str(coded))
    assert not (tmp_path / "ran").exists()
    chat = Path(shutil.copytree(blip, tmp_path / "chat"))
    parts = BlipProcessor.from_pretrained(blip)
    LlavaProcessor(parts.image_processor, parts.tokenizer, chat_template="{{ messages }}"
                   ).save_pretrained(chat)
    with pytest.raises(ValueError, match="is a chat model"):
        run(dataset, str(chat))


def test_a_damaged_journal_is_named(dataset: Path, blip: str) -> None:
    (dataset / "captions.jsonl").write_text('{"id": "0123\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl has a damaged line"):
        run(dataset, blip)


@pytest.mark.slow
def test_two_processes_share_the_photos(dataset: Path, blip: str, tmp_path: Path) -> None:
    """Started by what `accelerate launch` uses for several GPUs; it has no such way on a CPU."""
    alone = Path(shutil.copytree(dataset, tmp_path / "alone"))
    run(alone, blip)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m",
         "gps_guidance.cli", "caption", str(dataset), "--model", blip, "--batch-size", "4"],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"12 captions of {blip} in {dataset}"]
    assert (dataset / "manifest.parquet").read_bytes() == (alone / "manifest.parquet").read_bytes()
    counts = [len((dataset / f"captions-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert counts == [8, 4]  # batches 0 and 2, batch 1


def test_the_large_model_has_the_shapes_that_we_feed_it() -> None:
    """blip-image-captioning-large by its config's numbers, without its weights."""
    config = BlipConfig(
        text_config={"vocab_size": 30524, "hidden_size": 768, "num_hidden_layers": 12,
                     "num_attention_heads": 12, "intermediate_size": 3072,
                     "encoder_hidden_size": 1024, "max_position_embeddings": 512,
                     "bos_token_id": 30522, "sep_token_id": 102, "pad_token_id": 0},
        vision_config={"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                       "intermediate_size": 4096, "image_size": 384, "patch_size": 16},
        projection_dim=768, image_text_hidden_size=256,
    )
    with torch.device("meta"):
        model = BlipForConditionalGeneration(config).to(torch.bfloat16).eval()
        out = model(pixel_values=torch.zeros(2, 3, 384, 384, dtype=torch.bfloat16),
                    input_ids=torch.zeros(2, 5, dtype=torch.long))
    assert out.last_hidden_state.shape == (2, 577, 1024)  # 24 x 24 patches and the class token
    assert out.logits.shape == (2, 5, 30524)
    assert 4.4e8 < model.num_parameters() < 4.8e8
