"""Tests of maskembed.py with tiny ViTs. They need no internet and no GPU: python -m pytest -q"""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # set before torch is imported: all tests run on the CPU
os.environ["OMP_NUM_THREADS"] = "1"  # more threads round results differently
import argparse, json, re, subprocess, sys, types
from pathlib import Path

import numpy as np
import pytest
import timm.scheduler
import torch
import torch.nn as nn
from PIL import Image
from timm.models import VisionTransformer
from torch.utils.data import default_collate

import maskembed
from maskembed import MaskEmbed, Teacher, mask_pixels, maskembed_loss

torch.backends.mps.is_available = lambda: False
HERE = Path(__file__).resolve().parent
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0)
VITS = {
    "clip": dict(pre_norm=True, act_layer="quick_gelu", norm_layer=nn.LayerNorm),  # eps 1e-5
    "siglip": dict(class_token=False, global_pool="map"),
    "registers": dict(reg_tokens=4, no_embed_class=True, qk_norm=True),
    "not square, pixels left over": dict(img_size=(45, 60), patch_size=14),
}


def fill(module, phase):  # sets all parameters by a formula, without random numbers
    for i, (name, p) in enumerate(sorted(module.named_parameters())):
        is_one = (p.ndim == 1 and name.endswith("weight")) or name.endswith("gamma")
        wave = 0.2 * torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i + phase)
        p.data.copy_((is_one + wave).reshape(p.shape))
    return module


def tiny(name):
    """Returns a ViT in float64, two images, and three masks for each of them."""
    vit = fill(VisionTransformer(**TINY | VITS[name]).double().eval(), phase=0)
    shape, num_patches = (2, 3, *vit.patch_embed.img_size), vit.patch_embed.num_patches
    images = 1.5 * torch.sin(0.05 * torch.arange(np.prod(shape), dtype=torch.float64))
    drawn = ((7 * torch.arange(2 * num_patches)) % 5 < 2).double().reshape(2, num_patches)
    masks = torch.stack([drawn, 1 - drawn, torch.ones_like(drawn)], dim=1)
    return vit, images.reshape(shape), masks


def descend(model, teacher, batches, rates):
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    losses, norms = [], []
    for (images, masks), lr in zip(batches, rates, strict=True):
        loss = maskembed_loss(model, teacher, images, masks)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


# ==== the method ==================================================================================
@pytest.mark.parametrize("keep", [None, 0.0, 0.25, 1.0])
def test_masks(keep):
    masks = maskembed.sample_masks(9000, 8, 3, keep, torch.Generator().manual_seed(1))
    again = maskembed.sample_masks(9000, 8, 2, keep, torch.Generator().manual_seed(1))
    assert masks.shape == (9000, 3, 8) and torch.equal(again, masks[:, :2])
    assert set(masks.unique().tolist()) == {0.0, 1.0} and (masks[:, 2] == 1).all()
    assert torch.equal(masks[:, 1], 1 - masks[:, 0])
    visible = masks[:, 0].sum(dim=1)
    if keep is None:  # every number of visible patches, 0 to 8, is equally likely
        assert (visible.long().bincount(minlength=9) / 1000 - 1).abs().max() < 0.15
    else:  # their number has a binomial distribution
        assert abs(visible.mean() - 8 * keep) < 0.1
        assert abs(visible.var() - 8 * keep * (1 - keep)) < 0.1


def test_mask_pixels_by_hand():
    image = torch.arange(1.0, 36).view(1, 1, 5, 7)  # 2 x 3 patches of 2 x 2 pixels, and a margin
    mask = torch.tensor([[[1.0, 1, 0, 0, 0, 1]]])
    visible = torch.zeros(5, 7)
    visible[0:2, 0:4] = 1  # the first two patches of the first row
    visible[2:4, 4:6] = 1  # the last patch of the second row
    assert torch.equal(mask_pixels(image, mask, patch_size=2)[0], image * visible)


@pytest.mark.parametrize("name", VITS)
def test_mask_equivalence(name):
    vit, images, masks = tiny(name)
    teacher = Teacher(vit, skip_blocks=0).train()
    teacher.vit.blocks[0].mlp.drop1.p = 0.5  # has no effect, because the ViT stays in eval mode
    teacher.scale.fill_(2.0)
    target = teacher(images, masks)
    # The full mask gives timm's own output.
    torch.testing.assert_close(target[:, 2], 2 * vit.forward_features(images))
    # Hidden pixels have no influence at all.
    visible = mask_pixels(torch.ones_like(images), masks, vit.patch_embed.patch_size[0])[:, 0] == 1
    changed = torch.where(visible, images, torch.randn_like(images))
    assert torch.equal(teacher(changed, masks[:, :1]), target[:, :1])
    # Masking pixels is the same as using the embedding of a blank patch where the mask is 0.
    embedding, blank = vit.patch_embed(images), vit.patch_embed(torch.zeros_like(images))
    vit.patch_embed.forward = lambda x: torch.where(masks[:, 0, :, None] == 1, embedding, blank)
    torch.testing.assert_close(target[:, 0], 2 * vit.forward_features(images))


# The authors' encoder and decoder (commit 092ed8e, timm 1.0.8 to 1.0.12, float64) gave these
# numbers with the ViTs, images and masks of `tiny`. To repeat this, apply `fill` to their modules.
ORACLE = {  # mean and std of target, mean and std of prediction, number of parameters, loss without
    # soft cap after four steps of AdamW, loss before each of them, norm of the first gradient
    "clip": [0.040345193349, 1.068894249814, -0.001899014298, 0.404346847255, 73216, 0.755322188884,
             1.1501619631, 1.9068529734, 0.9603307935, 0.8098980471, 4.097890460436],
    "siglip": [0.050766139995, 1.047459410078, -0.000405711126, 0.347637260223, 73088,
               0.565477106103, 1.3671017089, 1.6074432401, 0.9082765902, 0.6581726284,
               6.436986406898],
}


@pytest.mark.parametrize("name", ORACLE)
def test_numbers_of_the_authors_code(name):
    vit, images, masks = tiny(name)
    teacher, model, uncapped = Teacher(vit), MaskEmbed(vit, softcap=2.0), MaskEmbed(vit, softcap=0)
    fill(model.encoder, phase=1)
    fill(model.decoder, phase=2)
    target, prediction = teacher(images, masks), model(images, masks)
    loss, target_std = maskembed.evaluate(model, teacher, zip(images.split(1), masks.split(1)))
    losses, norms = descend(model, teacher, 4 * [(images, masks)], 4 * [3e-3])
    uncapped.load_state_dict(model.state_dict())
    ours = [target.mean(), target.std(correction=0), prediction.mean(),
            prediction.std(correction=0), torch.tensor(sum(p.numel() for p in model.parameters())),
            maskembed_loss(uncapped, teacher, images, masks)]
    ours = [number.item() for number in ours] + losses + norms[:1]
    assert ours == pytest.approx(ORACLE[name], rel=1e-6)
    assert [loss, target_std] == pytest.approx([losses[0], ours[1]], rel=1e-5) and model.training


@pytest.mark.parametrize("name", VITS)
def test_gradient_flow(name):
    vit, images, masks = tiny(name)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    teacher, model = Teacher(vit), MaskEmbed(vit)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        maskembed_loss(model, teacher, images, masks).backward()
        assert all(p.grad is None for p in teacher.parameters())
        reached = {key for key, p in model.named_parameters() if p.grad.any()}
        assert {"encoder.head.weight", "decoder.pos_embed", "decoder.head.bias"} <= reached
        # In the first step, the zero head stops the gradient.
        assert ("encoder.blocks.0.attn.qkv.weight" in reached) == (step == 1)
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in vit.state_dict().items())
    kept = {key for key in before if not key.startswith("attn_pool")}
    assert set(model.encoder.state_dict()) == kept | {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", VITS)
def test_decoder_sees_only_visible_patches(name):
    vit, images, masks = tiny(name)
    model = fill(MaskEmbed(vit), phase=1)
    tokens = model.encoder(images).detach().requires_grad_()
    for k in range(3):
        prediction = model.decoder(tokens, masks[:, k:k + 1])  # (B, 1, T, D)
        torch.testing.assert_close(prediction, model(images, masks)[:, k:k + 1])
        gradient, = torch.autograd.grad(prediction.sum(), tokens)
        visible = nn.functional.pad(masks[:, k] == 1, (vit.num_prefix_tokens, 0))  # (B, T)
        assert torch.equal(gradient.abs().amax(dim=-1) > 0, visible)


def test_loss_falls_on_one_batch():
    vit, images, masks = tiny("clip")
    losses, _ = descend(MaskEmbed(vit), Teacher(vit), 30 * [(images, masks)], 30 * [3e-3])
    assert losses[-1] < 0.2 * losses[0]
    with pytest.raises(AssertionError, match="shapes"):
        maskembed_loss(MaskEmbed(vit), lambda *_: torch.zeros(2, 1, 17, 32), images, masks)


@pytest.mark.parametrize("model", [
    "resnet18", "vit_tiny_r_s16_p8_224", dict(global_pool="avg"), dict(scale_attn_norm=True)])
def test_other_models_are_refused(model):
    vit = timm.create_model(model) if isinstance(model, str) else VisionTransformer(**TINY | model)
    with pytest.raises(ValueError, match="not a plain ViT|other layers"):
        MaskEmbed(vit)


def test_learning_rate_is_that_of_timms_scheduler():
    for total, warmup in ((110, 10), (110, 0), (30, 30), (1, 0)):
        scheduler = timm.scheduler.CosineLRScheduler(
            torch.optim.SGD([torch.zeros(1)], lr=3e-4), t_initial=total, lr_min=3e-5,
            warmup_t=warmup, warmup_lr_init=3e-5, t_in_epochs=False)
        ours = [maskembed.learning_rate(step, total, warmup, peak=3e-4) for step in range(total)]
        timms = [scheduler._get_lr(step)[0] for step in range(total)]
        assert ours == pytest.approx(timms, rel=1e-9)


def test_seed_epoch_and_index_decide_images_and_masks():
    def item(seed, epoch, i):
        data = maskembed.MaskedImages(range(9), lambda i: torch.rand(2) + i, 16, seed=seed)
        return torch.cat([x.flatten() for x in data[epoch, i]])
    assert not any(torch.equal(item(0, 0, 1), item(*k)) for k in ((1, 0, 1), (0, 1, 1), (0, 0, 2)))
    order = list(maskembed.training_order(21, epochs=3, batch_size=8, seed=5))
    assert len(order) == 6 and {i for _, i in order[0]} != {i for _, i in order[2]}
    assert list(maskembed.training_order(21, 3, 8, seed=5, start=3)) == order[3:]
    assert len(set(order[4] + order[5])) == 16  # no image twice in an epoch


# ==== the program =================================================================================
@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(maskembed.draw_letters(50)[0]):
        picture.save(folder / f"{i:02}.{['jpg', 'PNG', 'webp'][i % 3]}")
    return folder


def flags(data, out, *others):
    """The flags of a run that takes a second: 45 images, 10 updates, 2 x 2 patches in an image."""
    fixed = ("--model test_vit --no-pretrained --img-size 32 --epochs 2 --lr 1e-3 --log-every 1 "
             "--workers 0 --batch-size 8").split()
    return [*fixed, "--data", str(data), "--out", str(out), *map(str, others)]


def results(out):
    entries = [json.loads(line) for line in open(out / "log.jsonl")]
    return torch.load(out / "last.pt", weights_only=True), entries


def test_one_process_and_two_and_a_plain_loop_agree(pictures, tmp_path, monkeypatch):
    others = "--warmup-epochs 1 --num-masks 2 --keep 0.6 --seed 5".split()
    runs, logged = [], []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **run: runs.append(run), log=lambda entry, step: logged.append(entry)))
    maskembed.main(flags(pictures, tmp_path / "one", *others, "--wandb"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = flags(pictures, tmp_path / "two", *others, "--batch-size=2", "--accum=2", "--workers=1")
    done = subprocess.run([*torchrun, __file__, *two], capture_output=True, text=True, timeout=100)
    assert "8 images per update: 2 processes x 2 micro-batches x 2" in done.stdout, done.stderr
    (one, one_log), (two, two_log) = results(tmp_path / "one"), results(tmp_path / "two")
    assert logged == one_log and len(runs) == 1 and runs[0]["config"]["num_masks"] == 2
    torch.testing.assert_close(two["model"], one["model"], rtol=0, atol=2e-4)
    torch.testing.assert_close(two_log, one_log, rtol=1e-4, atol=0)
    # The same training as a plain loop.
    torch.manual_seed(5)
    vit = timm.create_model("test_vit", img_size=32)
    teacher, model = Teacher(vit), MaskEmbed(vit)
    train_set, val_set = maskembed.open_data(vit, pictures, 2, 0.6, seed=5)
    images, masks = default_collate([val_set[0, i] for i in range(5)])
    teacher.scale /= teacher(images, masks).std(correction=0)
    order = maskembed.training_order(45, epochs=2, batch_size=8, seed=5)
    batches = [default_collate([train_set[key] for key in keys]) for keys in order]
    rates = [maskembed.learning_rate(step, 10, 5, peak=1e-3) for step in range(10)]
    losses, norms = descend(model, teacher, batches, rates)
    assert max(norms) > 1.2  # so clipping matters
    assert [e["loss"] for e in one_log if "loss" in e] == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(one["model"], model.state_dict(), rtol=0, atol=1e-4)


def refusal(capsys, arguments):
    """Runs the program, which should refuse to start, and returns its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        maskembed.main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1, message
    return message


def test_processes_that_disagree_and_backends(pictures, tmp_path, capsys, monkeypatch):
    backends = []
    monkeypatch.setattr(maskembed, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", backends.append)
    def gather(everyone, mine):
        everyone[:] = [mine, dict(mine, lr=1, num_images=44, step=4)]
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert "['lr', 'num_images', 'step']" in refusal(capsys, flags(pictures, tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as if there were two GPUs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for has_nccl in (True, False):  # Windows has no NCCL
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
        assert maskembed.init_distributed() == torch.device("cuda", 0)
    assert backends == ["gloo", "cpu:gloo,cuda:nccl", "gloo"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="more processes than GPUs"):
        maskembed.init_distributed()


def test_killed_and_resumed_equals_whole(pictures, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    maskembed.main(flags(pictures, whole, "--epochs", 6))
    arguments = flags(pictures, killed, "--epochs", 6, "--save-every", 1, "--workers", 1)
    process = subprocess.Popen([sys.executable, __file__, *arguments])
    while not (killed / "last.pt").exists() or results(killed)[0]["step"] < 3:
        assert process.poll() is None
    process.kill()
    process.wait()
    assert results(killed)[0]["step"] < 30
    assert "continue with --resume" in refusal(capsys, arguments)
    changed = refusal(capsys, [*arguments, "--resume", "--keep", "1", "--batch-size", "4"])
    assert "{'keep': None, 'images_per_update': 8}" in changed
    for _ in range(2):  # the second time, only validation is left to do
        maskembed.main([*arguments, "--resume"])
        for key in ("model", "optimizer", "scale", "step"):
            saved, expected = results(killed)[0][key], results(whole)[0][key]
            torch.testing.assert_close(saved, expected, rtol=0, atol=0)


def test_folders(pictures, tmp_path):
    vit = timm.create_model("test_vit")
    (tmp_path / "train").symlink_to(pictures)
    (tmp_path / ".hidden").symlink_to(pictures)
    train_set, val_set = maskembed.open_data(vit, tmp_path, keep=0.3)
    assert (len(train_set), train_set.keep, len(val_set), val_set.keep) == (45, 0.3, 5, 0.3)
    assert not set(train_set.images.indices) & set(val_set.images.indices)
    assert re.findall(r"^    (\w+)", repr(train_set.transform), re.MULTILINE) == [
        "ResizeKeepRatio", "CenterCropOrPad", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]
    assert "CenterCrop" in repr(val_set.transform) and "[0.5000, 0.5000" in repr(val_set.transform)
    for name in ("validation", "valid", "val"):
        (tmp_path / name).symlink_to(pictures)
        assert [len(data) for data in maskembed.open_data(vit, tmp_path)] == [50, 50]
        (tmp_path / name).unlink()


def test_images_that_cannot_be_read(pictures, tmp_path, capsys):
    (tmp_path / "empty.jpg").touch()
    for i in range(30):
        Image.new(["F", "I;16"][i % 2], (9, 9)).save(tmp_path / f"{i:02}.tif")
    with pytest.raises(ValueError, match="20 files could not be read"):
        maskembed.Folder(tmp_path)[0]
    for i, path in enumerate(pictures.rglob("*.*")):
        (tmp_path / f"{30 + i}{path.suffix}").write_bytes(path.read_bytes())
    maskembed.main(flags(tmp_path, tmp_path / "out"))
    replaced = re.findall(r"replaced .*/(.*): (?:a greyscale|cannot)", capsys.readouterr().err)
    assert {"empty.jpg", "07.tif", "08.tif"} <= set(replaced)


def test_checkpoint_of_another_size(tmp_path):
    path, other = tmp_path / "other.pt", fill(timm.create_model("test_vit", img_size=64), phase=3)
    torch.save({"state_dict": other.state_dict(), "args": argparse.Namespace(lr=1)}, path)
    vit = maskembed.create_vit("test_vit", img_size=32, checkpoint=path)
    assert vit.pos_embed.shape == (1, 5, 64) and vit.pos_embed.std() > 0.05  # not the initial 0.02


def test_wrong_input_is_one_line_and_exit_code_2(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb fails
    for name in ("empty", "one", "cut", "other"):
        Path(name).mkdir()
    Image.new("RGB", (9, 9)).save("one/a.png")
    Path("cut/last.pt").write_bytes(b"PK\x03\x04")
    torch.save([1, 2], "other/last.pt")
    torch.save({"norm.weight": torch.ones(64)}, "part.pt")
    for others, text in {
        "--nope": "--nope", "--lr nan": "--lr", "--epochs 0": "--epochs", "--keep 2": "--keep",
        "--warmup-epochs 2": "[0, 1]", "--model vit_base_patch61_224": "patch61",
        "--model vit_tiny_patch16_224 --pretrained": "vit_tiny", "--model resnet18": "ResNet",
        "--skip-blocks 6": "6 blocks", "--img-size 8": "height (8)", "--data nowhere": "nowhere",
        "--data=": "no folder ''", "--data empty": "empty", "--data one": "0 images",
        "--batch-size 64": "45 images", "--checkpoint none": "No such file", "--wandb": "wandb",
        "--checkpoint cut/last.pt": "cut", "--checkpoint part.pt": "lacks", "--out /proc": "/proc",
        "--out one/a.png": "a.png", "--out cut --resume": "cut", "--out other --resume": "other",
    }.items():
        assert text in refusal(capsys, flags(pictures, "out", *others.split())), others
    with pytest.raises(FloatingPointError, match="step"):  # a loss that is not finite is not saved
        maskembed.main(flags(pictures, "out", "--lr", 1e9))
    assert not Path("out/last.pt").exists()


def test_compile_and_load_aligned(pictures, tmp_path, monkeypatch):
    real, compiled = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda block, **options: compiled.append(
        real(block, backend="eager", **options)))  # this backend needs no C++ compiler
    maskembed.main(flags(pictures, tmp_path, "--compile", "--softcap=0.1", "--dtype=bfloat16"))
    assert len(compiled) == 5 + 6 + 2  # the blocks of teacher, encoder and decoder
    model = MaskEmbed(timm.create_model("test_vit", img_size=32), softcap=0.1)
    model.load_state_dict(results(tmp_path)[0]["model"])
    images, aligned = torch.randn(2, 3, 32, 32), maskembed.load_aligned(tmp_path / "last.pt")
    torch.testing.assert_close(aligned(images), model.encoder.forward_features(images))
    assert aligned.pretrained_cfg["input_size"] == (3, 32, 32)


def test_demo_and_probe(tmp_path, capsys):
    maskembed.main(["--demo", "4", "--num-masks", "2", "--out", str(tmp_path)])
    assert re.search(r"teacher\n.*control\n.*aligned\n.*demo.png", capsys.readouterr().out)
    colours = {colour for _, colour in Image.open(tmp_path / "demo.png").getcolors(2**24)}
    assert {(0, 128, 0), (255, 0, 0)} <= colours  # right and wrong predictions
    vit = types.SimpleNamespace(get_intermediate_layers=lambda images, *_, **__: [images])
    labels = torch.randint(9, (200, 9))
    iou, predicted = maskembed.probe(vit, 0, nn.functional.one_hot(labels, 9).float(), labels)
    assert iou == 1 and torch.equal(predicted, labels[100:])
    assert maskembed.probe(vit, 0, torch.randn(200, 9, 8), labels)[0] < 0.15  # chance


def test_commands_and_snippets_of_the_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, readme = maskembed.draw_letters, (HERE / "README.md").read_text()
    monkeypatch.setattr(maskembed, "draw_letters", lambda n, *s, **k: draw(min(n, 90), *s, **k))
    command = re.search(r"maskembed.py (--model test_vit .*)", readme)[1]
    maskembed.main([*command.split(), "--workers", "0"])
    for snippet in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(snippet, {})
    published = dict(softcap=30, skip_blocks=1, num_masks=3, keep=None, lr=3e-4, epochs=5)
    assert vars(maskembed.parse_args([])).items() >= published.items()
    configs = (HERE / "configs.md").read_text()
    shared, = re.findall(r"^    torchrun .*maskembed.py (.*)$", configs, re.MULTILINE)
    rows = re.findall(r"^\|[^|`]*\| `(.*)` \|$", configs, re.MULTILINE)
    for row in rows:
        args = maskembed.parse_args(f"{shared} {row}".split())
        assert args.model in timm.list_pretrained() and 4 * args.batch_size * args.accum == 1024
    assert len(set(rows)) == len(rows) == 35


if __name__ == "__main__":  # two tests run this file as a program
    class DDP(nn.parallel.DistributedDataParallel):
        def __init__(self, model):
            os.register_at_fork(before=lambda: os._exit(1))  # end if anything forks after DDP
            super().__init__(model)
    nn.parallel.DistributedDataParallel = DDP
    maskembed.main(sys.argv[1:])
