"""Which names are checkpoints. Listings inline; nothing touches a disk but where it says so."""

from __future__ import annotations

import pytest

from gradwatch.agent.checkpoints import find, listing
from gradwatch.agent.checkpoints.listing import File, Listing
from gradwatch.agent.checkpoints.result import Layout

HF = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
)


def seen(*paths: str) -> Listing:
    return Listing({path: File(1, 1) for path in paths})


def under(folder: str, names) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        # files that stand alone
        (
            ("a.pt", "b.pth", "c.safetensors", "d.ckpt"),
            {"a.pt": "torch", "b.pth": "torch", "c.safetensors": "safetensors", "d.ckpt": "lightning"},
        ),
        # .bin is a checkpoint only by its name
        (("train.bin", "pytorch_model.bin", "training_args.bin"), {"pytorch_model.bin": "torch"}),
        # folders of several files
        (under("checkpoint-500", HF), {"checkpoint-500": "hf"}),
        (
            under("checkpoint_0", ("model.safetensors", "optimizer.bin", "random_states_0.pkl")),
            {"checkpoint_0": "hf"},
        ),
        (
            under("runs/a/checkpoint-5", HF) + under("runs/a/checkpoint-9", HF),
            {"runs/a/checkpoint-5": "hf", "runs/a/checkpoint-9": "hf"},
        ),
        (("step-3/.metadata", "step-3/__0_0.distcp"), {"step-3": "dcp"}),
        # .metadata is written last: without it, it is one all the same
        (("step-3/__0_0.distcp", "step-3/__1_0.distcp"), {"step-3": "dcp"}),
        # Lightning with sharded state
        (
            (
                "epoch=1-step=8.ckpt/.metadata",
                "epoch=1-step=8.ckpt/__0_0.distcp",
                "epoch=1-step=8.ckpt/meta.pt",
            ),
            {"epoch=1-step=8.ckpt": "dcp"},
        ),
        (("step_100/model.pt", "step_100/optim.pt"), {"step_100": "torch"}),
        (
            ("checkpoint-7/global_step7/mp_rank_00_model_states.pt", *under("checkpoint-7", HF)),
            {"checkpoint-7": "hf"},
        ),
        (
            (
                "checkpoint-7/pytorch_model_fsdp_0/.metadata",
                "checkpoint-7/pytorch_model_fsdp_0/__0_0.distcp",
                "checkpoint-7/trainer_state.json",
            ),
            {"checkpoint-7": "hf"},
        ),
        # a folder that is named after a run, not after a step
        (
            ("run_1/step_100.pt", "run_1/step_200.pt"),
            {"run_1/step_100.pt": "torch", "run_1/step_200.pt": "torch"},
        ),
        # a final model beside its checkpoints owns its own files only
        (
            ("out/model.safetensors", "out/trainer_state.json", *under("out/checkpoint-5", HF)),
            {"out": "hf", "out/checkpoint-5": "hf"},
        ),
        # hidden files and folders, and what is not a checkpoint
        ((".tmp/a.pt", ".a.pt", "notes.txt", "events.out", "data.npy"), {}),
        ((), {}),
    ],
)
def test_candidates(paths, found):
    assert {candidate.path: candidate.layout.value for candidate in find.find(seen(*paths))} == found


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        (Layout.AUTO, ["a.pt", "b.ckpt", "c.ckpt", "checkpoint-5", "d", "e.safetensors"]),
        (Layout.TORCH, ["a.pt", "b.ckpt"]),
        (Layout.LIGHTNING, ["b.ckpt", "c.ckpt"]),
        (Layout.HF, ["checkpoint-5"]),
        (Layout.DCP, ["c.ckpt", "d"]),
        (Layout.SAFETENSORS, ["e.safetensors"]),
    ],
)
def test_a_named_layout_leaves_the_others_out(layout, found):
    everything = seen(
        "a.pt", "b.ckpt", "c.ckpt/.metadata", *under("checkpoint-5", HF), "d/.metadata", "e.safetensors"
    )
    assert [candidate.path for candidate in find.find(everything, layout)] == found


def test_a_checkpoint_that_somebody_names_may_have_any_name():
    shown = seen("run/model.safetensors", "run/optimizer.pt", "final/only.pt", "x.weights")
    assert find.at(shown, "final").layout is Layout.TORCH
    assert find.at(shown, "x.weights").layout is Layout.TORCH
    assert find.at(shown, "nothing") is None


def test_a_listing_follows_no_link_and_skips_the_quarantine(tmp_path):
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    for folder in (outside, root / "a", root / listing.QUARANTINE / "1"):
        folder.mkdir(parents=True)
        (folder / "x.pt").write_bytes(b"123")
    (root / "out").symlink_to(outside)
    (root / "last.pt").symlink_to(root / "a" / "x.pt")
    (root / "loop").symlink_to(root)
    taken = listing.take(root)
    assert set(taken.files) == {"a/x.pt"}
    assert taken.symlinks == {"out", "last.pt", "loop"}
    assert [candidate.path for candidate in find.find(taken)] == ["a/x.pt"]
    # the declared root itself may be one
    (tmp_path / "alias").symlink_to(root)
    assert set(listing.take(tmp_path / "alias").files) == {"a/x.pt"}


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        listing.take(tmp_path / "missing")


@pytest.mark.parametrize(
    ("path", "relative"),
    [
        ("a/x.pt", "a/x.pt"),
        ("a/../b", "b"),
        (".", "."),
        ("new", "new"),
        ("../outside/x.pt", None),
        ("/etc/passwd", None),
        ("link/x.pt", None),
        ("within/x.pt", None),
        ("a/../../root2/x", None),
    ],
)
def test_a_path_must_lie_below_the_root(tmp_path, path, relative):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "within").symlink_to(root / "a")
    assert listing.inside(root, path) == relative
    (tmp_path / "alias").symlink_to(root)
    assert listing.inside(tmp_path / "alias", path) == relative
    assert listing.inside(tmp_path / "alias", root / "a") == "a"
    assert listing.inside(tmp_path / "alias", tmp_path / "alias" / "a") == "a"
