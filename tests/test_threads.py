"""Several calls at once, calls within calls, and Ctrl-C anywhere: right pictures, and nothing left behind."""

import copy
import os
import sys
import threading

import pytest
import torch
from diffusers import UNet2DConditionModel
from mde_edit import MDEEditPipeline, attention_processors
from mde_edit.attention_processors import attention_control

from .conftest import SOURCE, TARGET, make_pipe, state_of


EDIT = {"optimization_iterations": 1, "optimization_steps": 0.5, "output_type": "latent"}


@pytest.fixture
def own(components):
    """A pipeline whose U-Net is nobody else's."""
    return make_pipe({**components, "unet": copy.deepcopy(components["unet"])})


def jobs(pipe, other, image, masks):
    """Edits with either pipe and an inversion, each as a function that gives its latents."""
    inversion = pipe.invert(image, SOURCE, 2, method="direct", guidance_scale=3.0)
    edit = {"object_masks": {"dog": masks[0]}, "attribute_masks": {"red": masks[1]}, **EDIT}
    return {
        "edit": lambda: pipe(TARGET, inversion, **edit).images,
        "edit by another pipe": lambda: other(TARGET, inversion, **{**edit, "ccl_weight": 2.0}).images,
        "inversion": lambda: pipe.invert(image, SOURCE, 2, guidance_scale=2.0, num_inner_steps=1).null_embeds,
    }


@pytest.mark.parametrize("pairing", [("edit", "edit"), ("edit", "edit by another pipe"), ("edit", "inversion")])
def test_two_threads_give_what_one_gives(own, image, masks, pairing):
    work = jobs(own, MDEEditPipeline.from_pipe(own), image, masks)
    before = state_of(own)
    expected = {name: work[name]() for name in set(pairing)}
    wrong = []

    def repeat(name, delay):
        try:
            for _ in range(int(os.environ.get("ROUNDS", 3))):  # `make test-slow` makes fifteen
                threading.Event().wait(delay)
                if not torch.equal(work[name](), expected[name]):
                    wrong.append(name)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=repeat, args=(name, 0.003 * k)) for k, name in enumerate(pairing)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and state_of(own) == before


def test_the_tokenizer_serves_one_thread_at_a_time(own):
    """A fast tokenizer in two threads at once raises "Already borrowed", or takes the other call's padding."""
    errors = []
    expected = {prompt: own.tokens(prompt) for prompt in (SOURCE, TARGET, "a cat")}
    interval = sys.getswitchinterval()

    def repeat(prompt):
        try:
            for _ in range(100):
                assert own.tokens(prompt) == expected[prompt]
                assert own.embed(prompt).shape == (1, 77, 16)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(prompt,)) for prompt in expected]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_a_callback_may_edit_and_invert_on_the_same_unet(own, image, masks):
    work = jobs(own, own, image, masks)
    expected, inner = work["edit"](), []
    before = state_of(own)
    inversion = own.invert(image, SOURCE, 2, method="direct", guidance_scale=3.0)

    def fail(pipe, i, t, tensors):
        pipe._interrupt = True
        raise ZeroDivisionError

    def callback(pipe, i, t, tensors):
        inner.append(torch.equal(work["edit"](), expected))
        work["inversion"]()
        with pytest.raises(ZeroDivisionError):  # another scale, an interruption and an error stay the inner call's
            own("a cat", inversion, guidance_scale=1.0, callback_on_step_end=fail, **EDIT)
        assert any(not p.requires_grad for p in pipe.unet.parameters())  # the outer call still holds them
        return tensors

    masks = {"object_masks": {"dog": masks[0]}, "attribute_masks": {"red": masks[1]}}
    assert torch.equal(own(TARGET, inversion, **masks, **EDIT, callback_on_step_end=callback).images, expected)
    assert inner == [True, True] and state_of(own) == before


def test_leaving_for_the_second_time_touches_nothing(own):
    """Between an inner and an outer leaving the lock is free, and the U-Net may be another thread's."""
    control = attention_processors._Control(own.unet)
    control.enter()
    control.__exit__()
    with attention_control(own.unet):
        during = state_of(own)
        control.__exit__()
        assert state_of(own) == during


class Stance:
    """Stands in for the compiler's stance: what is set, and in which order it was put back."""

    def __init__(self):
        self.now = "default"

    def __call__(self, stance):
        outer, previous, self.now = self, self.now, stance

        class Setting:
            def __exit__(self, *_):
                outer.now = previous

        return Setting()


def test_the_compilers_stance_is_left_alone_unless_a_compiled_unet_needs_it(own, components, monkeypatch):
    stance = Stance()
    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    with attention_control(own.unet):
        assert stance.now == "default"
    one, other = copy.deepcopy(own.unet), copy.deepcopy(own.unet)
    one.compile(backend="eager")
    other.down_blocks[0].compile(backend="eager")  # a part of it will do
    first, second = attention_control(one), attention_control(other)
    first.__enter__()
    second.__enter__()
    assert stance.now == "force_eager"
    first.__exit__(None, None, None)  # in another order than they came
    assert stance.now == "force_eager"
    second.__exit__(None, None, None)
    assert stance.now == "default" and not attention_processors._COMPILED


def interrupted_at(number, action):
    """Run `action` with a KeyboardInterrupt at the `number`-th line that runs inside the attention control; whether the
    action got that far."""
    source, count = attention_processors.__file__, [0]
    names = {"attention_control", "__init__", "__enter__", "__exit__", "enter", "_compiles_attention", "lock_of"}

    def trace(frame, event, arg):
        if frame.f_code.co_filename != source or frame.f_code.co_name not in names:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number:
                raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(outer)
    return count[0] >= number


def is_free(lock):
    """Whether another thread could take it."""
    free = []

    def attempt():
        free.append(lock.acquire(blocking=False))
        if free[0]:
            lock.release()

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return free[0]


def test_ctrl_c_at_any_line_leaves_nothing_behind(monkeypatch):
    stance = Stance()
    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    unet = UNet2DConditionModel(  # the smallest: every parameter is a line
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    unet.compile(backend="eager")
    unet.conv_in.requires_grad_(False)

    def state():
        return {n: id(p) for n, p in unet.attn_processors.items()}, [p.requires_grad for p in unet.parameters()]

    before, lines = state(), 0

    def action():
        with attention_control(unet):
            assert stance.now == "force_eager" and state() != before

    while interrupted_at(lines + 1, action):
        lines += 1
        assert state() == before and stance.now == "default", f"after the line {lines} that ran"
        assert is_free(attention_processors.lock_of(unet)) and is_free(attention_processors._STANCE), lines
        assert not attention_processors._COMPILED and not attention_processors._STANCE_BEFORE
    assert lines > 100
