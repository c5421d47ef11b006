"""Tests of maskembed.py on tiny ViTs, without network and GPU: python -m pytest -q"""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the tests say the same everywhere
os.environ["OMP_NUM_THREADS"] = "1"  # another number of threads rounds differently
import argparse, json, re, shlex, subprocess, sys, time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from timm.models import VisionTransformer

import maskembed
from maskembed import MaskEmbed, Teacher, mask_pixels, maskembed_loss, reconstruction_loss

HERE = Path(__file__).resolve().parent
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0)
VITS = {
    "clip": dict(pre_norm=True, act_layer="quick_gelu", norm_layer=partial(nn.LayerNorm, eps=1e-5)),
    "siglip": dict(class_token=False, global_pool="map"),
    "registers": dict(reg_tokens=4, no_embed_class=True, qk_norm=True),
    "patch 14 at 45": dict(img_size=45, patch_size=14),
}


def fill(module, phase):  # no random state enters
    for i, (name, p) in enumerate(sorted(module.named_parameters())):
        base = p.ndim == 1 and name.endswith("weight") or name.endswith("gamma")
        wave = 0.2 * torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i + phase)
        p.data.copy_((base + wave).reshape(p.shape))
    return module


def tiny(name):
    """A ViT in float64, two images, three masks for each."""
    vit = fill(VisionTransformer(**TINY | VITS[name]).double().eval(), 0)
    size, num_patches = vit.patch_embed.img_size[0], vit.patch_embed.num_patches
    images = 1.5 * torch.sin(0.05 * torch.arange(6 * size * size, dtype=torch.float64))
    m = ((7 * torch.arange(2 * num_patches)) % 5 < 2).double().reshape(2, num_patches)
    return vit, images.reshape(2, 3, size, size), torch.stack([m, 1 - m, torch.ones_like(m)], 1)


# ---- the method
@pytest.mark.parametrize("keep", [None, 0.0, 0.25, 1.0])
def test_masks(keep):
    def draw(num_masks, seed=1):
        return maskembed.sample_masks(9000, 8, num_masks, keep, torch.Generator().manual_seed(seed))
    masks = draw(3)
    visible = masks[:, 0].sum(1)
    assert masks.shape == (9000, 3, 8) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks[:, 1], 1 - masks[:, 0]) and (masks[:, 2] == 1).all()
    assert torch.equal(masks[:, :2], draw(2)) and torch.equal(masks, draw(3))
    assert torch.equal(masks, draw(3, seed=2)) == (keep in (0, 1))
    if keep is None:  # uniform: 0 to 8 are equally likely
        assert (visible.long().bincount(minlength=9) / 1000 - 1).abs().max() < 0.15
    else:  # binomial
        assert abs(visible.mean() - 8 * keep) < 0.1 > abs(visible.var() - 8 * keep * (1 - keep))


def test_mask_pixels_by_hand():
    image, two = torch.arange(1.0, 26).view(1, 1, 5, 5), torch.ones(2, 2)
    masked = mask_pixels(image, torch.tensor([[[1.0, 0, 0, 1]]]), patch_size=2)
    assert torch.equal(masked[0], image * torch.block_diag(two, two, torch.zeros(1, 1)))


@pytest.mark.parametrize("name", VITS)
def test_mask_equivalence(name):
    vit, images, masks = tiny(name)
    teacher = Teacher(vit, skip_blocks=0)
    target = teacher(images, masks)
    torch.testing.assert_close(target[:, 2], vit.forward_features(images))  # the full mask
    # What is hidden has no influence at all.
    ones, patch_size = torch.ones_like(images), vit.patch_embed.patch_size[0]
    visible = mask_pixels(ones, masks, patch_size)[:, 0] == 1
    changed = torch.where(visible, images, torch.randn_like(images))
    assert torch.equal(teacher(changed, masks[:, :1]), target[:, :1])
    assert not torch.equal(teacher(changed, masks[:, 2:]), target[:, 2:])
    # Masking pixels puts the embedding of a blank patch where the mask is 0.
    embedding, blank = vit.patch_embed(images), vit.patch_embed(torch.zeros_like(images))
    vit.patch_embed.forward = lambda x: torch.where(masks[:, 0, :, None] == 1, embedding, blank)
    torch.testing.assert_close(target[:, 0], vit.forward_features(images))


def test_teacher_drops_blocks_and_stays_frozen():
    vit, images, masks = tiny("clip")
    teacher = Teacher(vit.train(), skip_blocks=1)
    assert not any(module.training for module in teacher.vit.blocks[0].modules())
    assert not any(module.training for module in teacher.train().vit.modules())
    teacher.scale.fill_(2.0)
    vit.blocks = vit.blocks[:2]
    torch.testing.assert_close(teacher(images, masks)[:, 2], 2 * vit.forward_features(images))
    with pytest.raises(ValueError, match="blocks"):
        Teacher(vit, skip_blocks=2)


ORACLE = {  # from the authors' code in float64: mean and std of target and prediction; mse, cosine,
    # parameters; mse at four steps of AdamW; gradient norm, mse without soft cap after the steps
    "clip": [0.040345193349, 1.068894249814, -0.001899014298, 0.404346847255, 1.150161963105,
             0.784828090710, 73216, 1.1501619631, 1.9068529734, 0.9603307935, 0.8098980471,
             4.097890460436, 0.755322188884],
    "siglip": [0.050766139995, 1.047459410078, -0.000405711126, 0.347637260223, 1.367101708899,
               1.143634948344, 73088, 1.3671017089, 1.6074432401, 0.9082765902, 0.6581726284,
               6.436986406898, 0.565477106103],
}


@pytest.mark.parametrize("name", ORACLE)
def test_numbers_of_the_authors_code(name):
    vit, images, masks = tiny(name)
    teacher, model, plain = Teacher(vit), MaskEmbed(vit, softcap=2.0), MaskEmbed(vit, softcap=0)
    fill(model.encoder, 1), fill(model.decoder, 2)
    target, prediction = teacher(images, masks), model(images, masks)
    found = [y for x in (target, prediction) for y in (x.mean(), x.std(correction=0))]
    found += [reconstruction_loss(prediction, target, kind) for kind in ("mse", "cosine")]
    found += [torch.tensor(sum(p.numel() for p in model.parameters()))]
    optimizer, norms = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95)), []
    for _ in range(4):
        found.append(maskembed_loss(model, teacher, images, masks))
        optimizer.zero_grad()
        found[-1].backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
    plain.load_state_dict(model.state_dict())
    found += [norms[0], maskembed_loss(plain, teacher, images, masks)]
    assert [x.item() for x in found] == pytest.approx(ORACLE[name], rel=1e-6)


@pytest.mark.parametrize("name", VITS)
def test_gradient_flow(name):
    vit, images, masks = tiny(name)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    teacher, model, prefix = Teacher(vit), MaskEmbed(vit), vit.num_prefix_tokens
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        maskembed_loss(model, teacher, images, masks).backward()
        assert all(p.grad is None for p in teacher.parameters())
        gradients = {key: p.grad.abs().max().item() for key, p in model.named_parameters()}
        body = [g for key, g in gradients.items() if "encoder." in key and ".head." not in key]
        assert (max(body) > 0) == (step > 0)  # the head is zero, once
        assert gradients["encoder.head.weight"] > 0 and gradients["decoder.pos_embed"] > 0
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(before[key], value) for key, value in vit.state_dict().items())
    kept = {key for key in before if not key.startswith(("attn_pool", "head"))}
    assert set(model.encoder.state_dict()) == kept | {"head.weight", "head.bias"}
    assert model.encoder.norm.eps == model.decoder.norm.eps == 1e-5
    tokens = model.encoder(images).detach().requires_grad_()
    for k in range(3):  # hidden patches and prefix tokens do not reach the decoder
        gradient, = torch.autograd.grad(model.decoder(tokens, masks[:, k:k + 1]).sum(), tokens)
        reached = gradient.abs().amax(-1) > 0
        assert not reached[:, :prefix].any() and torch.equal(reached[:, prefix:], masks[:, k] == 1)


def test_softcap():
    vit, images, _ = tiny("clip")
    plain, large = [MaskEmbed(vit, cap).encoder.forward_features(images) for cap in (0, 1e6)]
    torch.testing.assert_close(plain, large)
    attn = MaskEmbed(vit, softcap=1e-9).encoder.blocks[0].attn  # so all logits are equal
    x = 9 * torch.randn(2, 17, 32, dtype=torch.float64)
    mean_value = attn.qkv(x)[..., 64:].mean(1, keepdim=True).expand(-1, 17, -1)
    torch.testing.assert_close(attn(x), attn.proj(mean_value))
    with pytest.raises(AssertionError, match="mask"):  # not ignored in silence
        attn(x, attn_mask=torch.eye(17) == 1)
    vit, images = VisionTransformer(**TINY, in_chans=12).bfloat16(), torch.randn(2, 12, 32, 32)
    assert maskembed_loss(MaskEmbed(vit), Teacher(vit), images.bfloat16(), torch.ones(2, 1, 16)) > 0


@pytest.mark.parametrize("model", [
    "test_efficientnet", "deit_tiny_distilled_patch16_224", dict(global_pool="avg"),
    dict(scale_attn_norm=True), dict(patch_size=(8, 16))])
def test_other_models_and_shapes_are_refused(model):
    vit = timm.create_model(model) if isinstance(model, str) else VisionTransformer(**TINY | model)
    for part in (Teacher, MaskEmbed):
        with pytest.raises(ValueError, match="no plain timm ViT"):
            part(vit)
    x = torch.zeros(2, 3, 5, 8)
    for target, kind in ((x[:, :1], "mse"), (x[:1], "cosine"), (x, "l1")):
        with pytest.raises(ValueError):
            reconstruction_loss(x, target, kind)


# ---- the recipe
def test_learning_rate():
    rates = [maskembed.learning_rate(step, total=110, warmup=10, peak=1.0) for step in range(111)]
    assert [rates[i] for i in (0, 5, 10, 60, 110)] == pytest.approx([0.1, 0.55, 1, 0.55, 0.1])


def test_order_and_items():
    order = list(maskembed.training_order(21, epochs=3, batch_size=8, seed=5))
    assert [i for _, i in order[0]] != [i for _, i in order[2]] and len(order) == 6
    assert len(set(order[4] + order[5])) == 16  # no image twice in an epoch
    items = [maskembed.MaskedImages(range(9), lambda i: torch.rand(2) + i, 16, seed=seed)[epoch, i]
             for seed, epoch, i in ((0, 0, 1), (0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))]
    assert all(torch.equal(a, b) for a, b in zip(items[0], items[1]))
    assert not any(torch.equal(a, b) for item in items[2:] for a, b in zip(items[0], item))


def test_scale_is_of_all_entries_together():
    vit, images, masks = tiny("clip")
    vit.norm.bias.data += 1  # a mean that counts
    teacher, model = Teacher(vit), MaskEmbed(vit)
    found = maskembed.evaluate(model, teacher, [(images[:1], masks[:1]), (images[1:], masks[1:])])
    loss = maskembed_loss(model, teacher, images, masks).item()
    std = teacher(images, masks).std(correction=0).item()
    assert found == pytest.approx({"target_std": std, "val_loss": loss}, 1e-5) and model.training


# ---- the program
@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(maskembed.draw_letters(40)[0]):
        (folder / str(i % 3)).mkdir(exist_ok=True)
        picture.save(folder / str(i % 3) / f"{i:02}.{['jpg', 'PNG', 'webp'][i % 3]}")
    return folder


def words(*more):
    """For a run of a second: 36 images, 4 updates an epoch, 2 x 2 patches."""
    fixed = "--model test_vit --no-pretrained --img-size 32 --epochs 2 --lr 1e-3 --log-every 1"
    return [*fixed.split(), "--workers", "0", "--batch-size", "8", *map(str, more)]


def run(*words, torchrun=()):
    """The real command line in a process of its own -> exit code, what it printed."""
    command = [sys.executable, *torchrun, str(HERE / "maskembed.py"), *map(str, words)]
    done = subprocess.run(command, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=60)
    return done.returncode, done.stdout


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def entries(folder, key):
    return [json.loads(line)[key] for line in open(folder / "log.jsonl") if f'"{key}"' in line]


def test_one_process_equals_two_and_accumulation(pictures, tmp_path):
    common, one, accum, two = words("--data", pictures), *(tmp_path / name for name in "142")
    maskembed.main([*common, "--out", str(one)])
    maskembed.main([*common, "--out", str(accum), "--batch-size", "2", "--accum", "4"])
    common += ["--batch-size", "2", "--accum", "2", "--workers", "1"]
    code, text = run(*common, "--out", two, torchrun=TWO)
    assert code == 0 and "8 images = 2 processes x 2 x 2 micro-batches" in text, text
    assert last(one)["step"] == 8
    for other in (accum, two):
        for key in ("loss", "val_loss", "scale"):
            assert entries(other, key) == pytest.approx(entries(one, key), 1e-4)
        torch.testing.assert_close(last(other)["model"], last(one)["model"], rtol=0, atol=2e-4)


def test_killed_and_resumed_equals_whole(pictures, tmp_path, capsys):
    common, whole, killed = words("--data", pictures, "--epochs", 6), tmp_path / "w", tmp_path / "k"
    maskembed.main([*common, "--out", str(whole)])
    common += ["--save-every", "1", "--out", str(killed), "--workers"]
    process = subprocess.Popen([sys.executable, HERE / "maskembed.py", *common, "2"])
    while not (killed / "last.pt").exists() or last(killed)["step"] < 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert last(killed)["step"] < 24
    for wrong, text in {"": "--resume", "--resume --keep 1": "its keep was None",
                        "--resume --batch-size 4": "its images_per_update was 8"}.items():
        with pytest.raises(SystemExit):
            maskembed.main([*common, "0", *wrong.split()])
        assert text in capsys.readouterr().err
    for _ in range(2):  # the second time nothing is left to do but validation and export
        maskembed.main([*common, "1", "--resume"])
        for key in ("model", "optimizer", "scale", "step"):
            torch.testing.assert_close(last(killed)[key], last(whole)[key], rtol=0, atol=0)
    assert {path.name for path in killed.iterdir()} == {"last.pt", "log.jsonl", "encoder"}


def test_data_folders(pictures, tmp_path):
    found = lambda: tuple(map(len, maskembed.open_images(tmp_path)))
    flat, some = tmp_path / "flat", tmp_path.parent / "some"
    flat.mkdir(), some.mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.*"))):
        (flat / path.name).write_bytes(path.read_bytes())
        (flat / f"._{path.name}").write_bytes(b"Mac OS X")  # no image
        if i < 12:
            (some / path.name).write_bytes(path.read_bytes())
    assert found() == (36, 4)
    flat.rename(tmp_path / "train")  # alone: some of it is held out
    assert found() == (36, 4)
    some.rename(tmp_path / "val")
    assert found() == (40, 12)


def test_broken_images(pictures, tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.jpg").write_bytes(b"no image")
    common = words("--data", tmp_path, "--workers", 2, "--out", tmp_path / "out")
    code, text = run(*common)
    assert code == 2 and "error: in 20 tries" in text.splitlines()[-1]
    for i, path in enumerate(sorted(pictures.rglob("*.jpg"))[:10]):
        (tmp_path / f"{i:02}.jpg").write_bytes(path.read_bytes())
    first, second, skipped = [maskembed.Folder(tmp_path)[i].tobytes() for i in (0, 1, 39)]
    assert skipped == first != second
    code, text = run(*common, "--batch-size", 4, torchrun=TWO)  # fails in a worker
    assert code == 1 and "in 20 tries" in text and "DataLoader worker" in text


def test_export_and_load_aligned(pictures, tmp_path):
    maskembed.main(words("--data", pictures, "--out", tmp_path, "--softcap", 0.1))
    images, aligned = torch.randn(2, 3, 32, 32), maskembed.load_aligned(tmp_path / "last.pt")
    tokens = aligned(images)
    assert tokens.shape == (2, 5, 64) and not aligned.training
    plain = timm.create_model(f"local-dir:{tmp_path}/encoder", pretrained=True).eval()
    assert (plain(images) - tokens).abs().max() > 1e-3  # it has no soft cap, and another epsilon
    plain.norm.eps = 1e-5
    for block in plain.blocks:
        block.attn = maskembed.SoftcapAttention(block.attn, 0.1)
    torch.testing.assert_close(plain(images), tokens)


def test_checkpoint_of_another_size_with_a_prefix(tmp_path):
    path, other = tmp_path / "other.pt", fill(timm.create_model("test_vit", img_size=64), 3)
    state = {f"module.{key}": value for key, value in other.state_dict().items()}
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, path)
    vit = maskembed.create_vit("test_vit", img_size=32, checkpoint=path)
    assert torch.equal(vit.blocks[5].mlp.fc1.weight, other.blocks[5].mlp.fc1.weight)
    assert vit.pos_embed.shape == (1, 5, 64) and vit.pos_embed.std() > 0.05  # not the initial 0.02
    del state["module.norm.bias"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="norm.bias"):
        maskembed.create_vit("test_vit", img_size=32, checkpoint=path)


def test_wrong_input_is_one_line_and_exit_code_2(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # do not try for a minute
    Path("empty").mkdir()
    Path("cut.pt").write_bytes(b"PK\x03\x04")
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("evil",))})
    torch.save({"model": evil()}, "evil.pt")
    for more, text in {
        "--nope": "--nope", "--model vit_base_patch61_224": "vit_base_patch61_224",
        "--model resnet18": "ResNet", "--model resnet18 --img-size 64": "resnet18",
        "--model vit_tiny_patch16_224.no_such_tag --pretrained": "no_such_tag",
        "--model vit_tiny_patch16_224 --pretrained": "vit_tiny_patch16_224",
        "--data nowhere": "nowhere", "--data empty": "empty", "--batch-size 64": "--batch-size",
        "--epochs 0": "--epochs", "--lr nan": "--lr", "--keep 1.5": "--keep", "--demo 0": "--demo",
        "--skip-blocks 6": "6 blocks", "--out cut.pt/x": "cut.pt", "--checkpoint none": "none",
        "--checkpoint cut.pt": "cut.pt", "--checkpoint evil.pt": "evil.pt", "--img-size 8": "--img",
        "--out /proc": "/proc", "--demo 4 --out /proc": "/proc",
    }.items():
        with pytest.raises(SystemExit) as stop:
            maskembed.main(words("--data", pictures, "--out", "out", *more.split()))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and text in error, (more, error)
    assert not Path("evil").exists() and not list(Path(".").rglob("last.pt"))


def test_a_loss_that_is_not_finite_is_not_saved(pictures, tmp_path):
    with pytest.raises(FloatingPointError, match="step"):
        maskembed.main(words("--data", pictures, "--out", tmp_path, "--lr", 1e9))
    assert not (tmp_path / "last.pt").exists()


def test_other_settings_and_compile(pictures, tmp_path, monkeypatch):
    real, compiled, out = nn.Module.compile, [], [tmp_path / "0", tmp_path / "1"]
    monkeypatch.setattr(nn.Module, "compile", lambda block, **options: compiled.append(
        real(block, backend="eager", **options)))  # dynamo without a C++ compiler
    for i, more in enumerate(("--loss cosine --num-masks 1 --keep 0.5 --softcap 0 --dtype bfloat16",
                              "--num-masks 2 --skip-blocks 0 --warmup-epochs 1 --compile")):
        maskembed.main(words("--data", pictures, "--out", out[i], *more.split()))
        assert entries(out[i], "val_loss")[2] < entries(out[i], "val_loss")[0]
    assert len(compiled) == 6 + 6 + 2 and maskembed.load_aligned(out[1] / "last.pt")  # same keys
    assert entries(out[0], "scale") == [1.0]  # it is for the mse alone
    assert entries(out[1], "lr")[:2] == pytest.approx([1e-4, 1e-4 + 9e-4 / 4])
    assert entries(out[1], "lr")[-1] == last(out[1])["optimizer"]["param_groups"][0]["lr"]


def test_demo_and_its_parts(tmp_path, capsys):
    pictures, contents = maskembed.draw_letters(200, seed=3)
    colours = np.stack(pictures).reshape(200, 3, 16, 3, 16, 3)  # (n, row, y, column, x, RGB)
    strong = ((colours == 0) | (colours == 255)).all(5).any((2, 4))  # the noise is 64 to 192
    assert (strong == (contents > 0)).all() and contents.max() == 8
    labels = torch.from_numpy(contents.reshape(200, 9))
    vit = argparse.Namespace(get_intermediate_layers=lambda images, *_, **__: [images])
    read, iou = maskembed.probe(vit, 0, nn.functional.one_hot(labels).float(), labels)
    assert torch.equal(read, labels[100:]) and iou == 1
    assert maskembed.probe(vit, 0, torch.randn(200, 9, 8), labels)[1] < 0.15  # chance
    sheet = maskembed.main(["--demo", "4", "--num-masks", "2", "--out", str(tmp_path)])
    *_, table = capsys.readouterr().out.split("Mean IoU:\n")
    names = ("block 1", "block 2", "block 3", "control", "aligned", "gain", "gain", "demo.png")
    assert all(name in line for name, line in zip(names, table.splitlines(), strict=True))
    assert (tmp_path / "demo.png").exists() and sheet.size == (1648, 1056)


def test_readme_snippets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, text = maskembed.draw_letters, (HERE / "README.md").read_text()
    monkeypatch.setattr(maskembed, "draw_letters", lambda count, *more: draw(count // 10, *more))
    command = re.search(r"maskembed.py (--model test_vit .*)", text)[1]
    maskembed.main([*command.split(), "--workers", "0"])
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec("\n".join(snippets), {})
    assert len(snippets) == 2


def test_commands_of_configs_and_size_of_the_file():
    text = (HERE / "configs.md").read_text()
    shared, = re.findall(r"^    torchrun .*maskembed.py(.*)$", text, re.MULTILINE)
    rows = re.findall(r"^\|[^|`]*\| `(.*)` \|$", text, re.MULTILINE)
    recipes = [maskembed.parse_args(shlex.split(shared + " " + row)) for row in rows]
    for args in recipes:
        assert args.model in timm.list_pretrained(), args.model
        assert 4 * args.batch_size * args.accum == 1024 and args.compile, args
    assert len({args.out for args in recipes}) == len(rows) == 36  # each has a folder of its own
    assert len((HERE / "maskembed.py").read_text().splitlines()) <= 620
