"""Looking at real checkpoints of every layout, good and poisoned."""

from __future__ import annotations

import argparse
import json
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from gradwatch.agent.checkpoints.look import MAX_NAMED, look
from gradwatch.agent.checkpoints.result import Completeness, ScanResult, Section, StepSource
from tests.checkpoints import files
from tests.checkpoints.files import INF, NAN


def steps(result: ScanResult) -> dict[str, int]:
    return {step.source.value: step.step for step in result.steps}


def bad(result: ScanResult):
    return [(item.section.value, item.name, item.value, item.count) for item in result.nonfinite]


def as_torch(path, network, optimizer):
    return files.save(path / "step_300.pt", network, optimizer, global_step=300)


def as_legacy(path, network, optimizer):
    target = path / "step_300.pth"
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "global_step": 300}
    torch.save(state, target, _use_new_zipfile_serialization=False)
    return target


def as_modules(path, network, optimizer):
    torch.save({"model": network, "optimizer": optimizer, "step": 300}, path / "whole_300.pt")
    return path / "whole_300.pt"


def as_lightning(path, network, optimizer):
    return files.lightning(path / "epoch=3-step=300.ckpt", network, optimizer)


def as_hf(path, network, optimizer):
    return files.hf(path / "checkpoint-300", network, optimizer, step=300)


def as_hf_sharded(path, network, optimizer):
    return files.hf(path / "checkpoint-300", network, optimizer, step=300, shards=3)


def as_hf_bin(path, network, optimizer):
    return files.hf(path / "checkpoint-300", network, optimizer, step=300, shards=2, safe=False)


def as_dcp(path, network, optimizer):
    return files.dcp(path / "step-300", network, optimizer, step=300)


def as_folder(path, network, optimizer):
    folder = path / "step_300"
    folder.mkdir()
    torch.save(network.state_dict(), folder / "model.pth")
    torch.save(optimizer.state_dict(), folder / "optim.pth")
    return folder


LAYOUTS = {
    "torch": as_torch,
    "torch legacy": as_legacy,
    "torch modules": as_modules,
    "lightning": as_lightning,
    "hf": as_hf,
    "hf sharded": as_hf_sharded,
    "hf bin": as_hf_bin,
    "dcp": as_dcp,
    "torch folder": as_folder,
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
def test_a_good_checkpoint_is_complete_finite_and_tells_its_step(tmp_path, layout):
    path = LAYOUTS[layout](tmp_path, *files.trained())
    result = look(path)
    assert (result.error, result.unreadable, bad(result)) == (None, (), [])
    assert (result.completeness, result.finite) == (Completeness.COMPLETE, True), result.reason
    assert result.layout == layout.split()[0]
    told = steps(result)
    assert told.pop("optimizer") == 3
    assert told
    assert set(told.values()) == {300}
    counts = {section.value: count.tensors for section, count in result.sections.items()}
    # 6 parameters with two moments and a step each; running mean and variance, which are buffers
    assert counts == {"parameters": 6, "buffers": 2, "optimizer": 18}
    assert ScanResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@layouts
def test_a_planted_nan_is_named_where_it_is(tmp_path, layout):
    network, optimizer = files.trained()
    weight = network[2].weight
    files.plant(weight, NAN, count=2)
    files.plant(network[1].running_var, INF)
    files.plant(optimizer.state[weight]["exp_avg_sq"], INF, count=3)
    files.plant(optimizer.state[weight]["exp_avg"], -INF)
    result = look(LAYOUTS[layout](tmp_path, network, optimizer))
    assert (result.completeness, result.finite) == (Completeness.COMPLETE, False)
    found = {(section, name.rpartition(".")[2]): rest for section, name, *rest in bad(result)}
    assert found == {
        ("parameters", "weight"): ["nan", 2],
        ("buffers", "running_var"): ["+inf", 1],
        ("optimizer", "exp_avg"): ["-inf", 1],
        ("optimizer", "exp_avg_sq"): ["+inf", 3],
    }
    names = [name for section, name, _, _ in bad(result) if section == "parameters"]
    assert names[0].endswith("2.weight")


@layouts
def test_an_infinite_buffer_is_reported_and_not_judged(tmp_path, layout):
    network, optimizer = files.trained()
    files.plant(network[1].running_mean, -INF)
    result = look(LAYOUTS[layout](tmp_path, network, optimizer))
    assert result.finite is True
    assert [(section, value) for section, _, value, _ in bad(result)] == [("buffers", "-inf")]


def test_callbacks_losses_and_hyperparameters_never_count(tmp_path):
    network, optimizer = files.trained()
    path = files.lightning(tmp_path / "last.ckpt", network, optimizer, best_score=INF)
    assert (look(path).finite, bad(look(path))) == (True, [])
    other = files.save(
        tmp_path / "a.pt",
        network,
        optimizer,
        loss=torch.tensor(NAN),
        losses=torch.tensor([NAN, NAN]),
        best_loss=INF,
        args=argparse.Namespace(weights=torch.tensor([INF, NAN])),
        scheduler={"base_lrs": torch.tensor([NAN])},
        rng={"cpu": torch.get_rng_state(), "numpy": np.array([NAN, NAN])},
    )
    assert (look(other).finite, bad(look(other))) == (True, [])


@pytest.mark.parametrize(
    ("saved", "name"),
    [
        # a bare state dict
        (lambda state: state, "2.weight"),
        # a script's own nesting and keys
        (lambda state: {"nets": {"gan": {"weights": state}}, "epoch": 3}, "nets.gan.weights.2.weight"),
        # parameters beside containers
        (lambda state: {"config": {"a": 1}, **state}, "2.weight"),
        (lambda state: {"a": [list(state.values())]}, "a.0.7"),
        (lambda state: {"state": argparse.Namespace(model=state)}, "state.model.2.weight"),
        (lambda state: state["2.weight"], ""),
        (lambda state: {"ema": {"shadow": state, "decay": 0.9}}, "ema.shadow.2.weight"),
    ],
)
def test_a_poisoned_parameter_is_found_wherever_a_script_keeps_it(tmp_path, saved, name):
    network, _ = files.trained()
    files.plant(network[2].weight)
    torch.save(saved(network.state_dict()), tmp_path / "x.pt")
    result = look(tmp_path / "x.pt")
    assert bad(result) == [("parameters", name, "nan", 1)]
    assert result.finite is False


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda: torch.ones(7, dtype=torch.bfloat16), 1),
        (lambda: torch.ones(70_000, dtype=torch.float16), 1),
        (lambda: torch.full((8,), 3e38), 1),
        (lambda: torch.ones(7, dtype=torch.float64), 1),
        (lambda: torch.ones(7, dtype=torch.complex64), 2),
        (lambda: torch.ones(7).to(torch.float8_e5m2), 1),
    ],
)
@pytest.mark.parametrize("safe", [False, True])
def test_every_dtype_is_looked_at(tmp_path, make, values, safe):
    path = tmp_path / ("x.safetensors" if safe else "x.pt")
    write = safetensors.torch.save_file if safe else torch.save
    write({"w": make(), "i": torch.ones(3, dtype=torch.int64)}, path)
    assert look(path).finite is True
    poisoned = make()
    poisoned.view(-1)[3] = complex(NAN, NAN) if poisoned.is_complex() else NAN
    write({"w": poisoned, "i": torch.ones(3, dtype=torch.int64)}, path)
    assert bad(look(path)) == [("parameters", "w", "nan", values)]


def test_fp8_without_infinities(tmp_path):
    poisoned = torch.ones(7).to(torch.float8_e4m3fn)
    poisoned.view(torch.uint8)[3] = 0x7F
    torch.save({"w": poisoned}, tmp_path / "x.pt")
    assert bad(look(tmp_path / "x.pt")) == [("parameters", "w", "nan", 1)]


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense(tmp_path):
    poisoned = torch.eye(3) * NAN
    state = {
        "sparse": torch.eye(3).mul(INF).nan_to_num(nan=0.0, posinf=INF).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr() * NAN,
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.tensor([NAN])]),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "parameter": nn.Parameter(poisoned),
        "numpy": np.array([1.0, NAN]),
    }
    torch.save(state, tmp_path / "x.pt")
    assert {name: (value, count) for _, name, value, count in bad(look(tmp_path / "x.pt"))} == {
        "sparse": ("+inf", 3),
        "csr": ("nan", 3),
        "nested": ("nan", 1),
        "parameter": ("nan", 9),
        "numpy": ("nan", 1),
    }


@pytest.mark.parametrize(
    ("view", "count"),
    [
        (lambda base: base.t(), 3),
        (lambda base: base[:, ::2], 2),
        (lambda base: base[1:2], 0),
        (lambda base: base[0], 3),
        (lambda base: base[0, 1].expand(5), 1),
        (lambda base: base.reshape(2, 3, 2)[:, 1, :], 1),
        # it visits one element several times, and that counts once
        (lambda base: base.flatten().as_strided((3, 3), (1, 1), 3), 1),
    ],
)
def test_only_the_elements_of_a_view_count(tmp_path, view, count):
    base = torch.arange(12.0).reshape(2, 6)
    base[0, [1, 2, 4]] = NAN
    torch.save({"v": view(base), "other": torch.ones(2)}, tmp_path / "x.pt")
    found = bad(look(tmp_path / "x.pt"))
    assert found == ([("parameters", "v", "nan", count)] if count else [])


def test_tied_weights_are_named_under_each_name_and_read_once(tmp_path):
    weight = torch.full((1 << 20,), NAN)
    torch.save({"embed.weight": weight, "head.weight": weight}, tmp_path / "x.pt")
    result = look(tmp_path / "x.pt")
    assert [name for _, name, _, _ in bad(result)] == ["embed.weight", "head.weight"]
    assert result.read_bytes < 1.5 * (4 << 20)


def test_an_attention_mask_in_a_state_dict_is_a_buffer(tmp_path):
    causal = torch.full((6, 6), -INF).triu(1)
    torch.save({"h.attn.tril": causal, "h.attn.weight": torch.ones(3)}, tmp_path / "x.pt")
    result = look(tmp_path / "x.pt")
    assert (result.finite, bad(result)) == (True, [("buffers", "h.attn.tril", "-inf", 15)])
    # but a weight that looks like one is a weight
    torch.save({"h.attn.weight": causal}, tmp_path / "x.pt")
    assert look(tmp_path / "x.pt").finite is False


def test_many_bad_tensors_are_counted_and_the_first_named(tmp_path):
    torch.save({f"w{index}": torch.full((2,), NAN) for index in range(100)}, tmp_path / "x.pt")
    result = look(tmp_path / "x.pt")
    assert [item.name for item in result.nonfinite] == [f"w{index}" for index in range(MAX_NAMED)]
    count = result.sections[Section.PARAMETERS]
    assert (count.nonfinite_tensors, count.nonfinite_values) == (100, 200)


def test_many_small_tensors_and_one_large_are_read_once(tmp_path):
    torch.manual_seed(0)
    state = {f"w{index}": torch.randn(index % 300 + 1) for index in range(2000)}
    state["big"] = torch.randn(3_000_001)
    state["w777"][5] = NAN
    state["big"][2_999_999] = INF
    torch.save(state, tmp_path / "x.pt")
    result = look(tmp_path / "x.pt")
    assert bad(result) == [("parameters", "w777", "nan", 1), ("parameters", "big", "+inf", 1)]
    assert result.read_bytes < 1.3 * result.nbytes


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("epoch=3-step=1200.ckpt", 1200),
        ("model_v2_step_000700.pt", 700),
        ("ckpt-000031.pt", 31),
        ("iter_12_of_run.pt", 12),
        ("weights.pt", None),
        ("run7-99.pth", 99),
    ],
)
def test_a_step_in_the_name(tmp_path, name, step):
    torch.save({"w": torch.ones(2)}, tmp_path / name)
    told = [item.step for item in look(tmp_path / name).steps if item.source is StepSource.NAME]
    assert told == ([] if step is None else [step])


def test_a_file_without_parameters_says_so(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    result = look(tmp_path / "x.pt")
    assert (result.finite, result.error) == (None, "it holds neither parameters nor optimizer state")


def test_weights_that_cannot_be_read_leave_finiteness_unknown(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/weights.npy", b"1234")
    result = look(tmp_path / "x.pt")
    assert (result.completeness, result.finite) == (Completeness.COMPLETE, None)
    assert result.unreadable[0].reason == "a zip file that torch.save did not write"
    (tmp_path / "y.pt").write_bytes(b"something else entirely")
    assert look(tmp_path / "y.pt").unreadable[0].reason == "not a file that torch.save wrote"


def test_side_files_of_a_hugging_face_folder_are_not_needed(tmp_path):
    folder = as_hf(tmp_path, *files.trained())
    (folder / "training_args.bin").write_bytes(b"nobody can read this")
    assert (look(folder).completeness, look(folder).finite) == (Completeness.COMPLETE, True)
