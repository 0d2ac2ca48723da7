"""The naive edit: every pass whole, every map materialized, the source branch run again whenever it is looked at.

Written from the equations, without the package's engine, losses or schedulers; only the alignment is shared.
"""

import torch


class Tape:
    """What the naive attention reads and writes: plain attention with every probability on the table."""

    def __init__(self):
        self.mode, self.source, self.own = "plain", {}, {}
        self.alignment = self.cross = self.self_names = self.kept = None


class NaiveProcessor:
    def __init__(self, name, tape):
        self.name, self.tape = name, tape

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        tape, cross = self.tape, encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        q, k, v = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        probs = (attn.scale * torch.bmm(q, k.transpose(1, 2))).softmax(-1)  # (batch * heads, pixels, keys)
        heads = probs.shape[0] // hidden_states.shape[0]
        if tape.mode == "source":
            tape.source[self.name] = probs[-heads:]
        if tape.mode == "target":
            own = probs[-heads:]
            tape.own[self.name] = own
            if cross and tape.cross:
                kept = own * tape.kept[own.shape[1]] if tape.kept else own
                own = torch.where(tape.alignment.shared, tape.source[self.name][..., tape.alignment.mapper], kept)
            elif not cross and self.name in tape.self_names:
                own = tape.source[self.name]
            probs = torch.cat([probs[:-heads], own])
        out = attn.batch_to_head_dim(torch.bmm(probs, v))
        return attn.to_out[0](out)


def bce(x, s):
    return -(s * torch.log(x) + (1 - s) * torch.log(1 - x)).mean()


def naive_edit(
    pipe,
    inversion,
    source_embeds,
    target_embeds,
    alignment,
    regions,
    dilated,
    loss_names,
    self_names,
    settings,
    added=None,
    kept=None,
):
    """`regions`: list of (kind, token indices, soft mask, binary mask); `settings`: the pipe's keyword arguments;
    `added`: SDXL's further conditions of "source", "target" and "plain" passes; `kept`: pixels of a layer -> (pixels,
    tokens), how much of the target's own maps stays."""
    unet, n = pipe.unet, inversion.num_inference_steps
    tape, before = Tape(), dict(unet.attn_processors)
    tape.alignment, tape.kept = alignment, kept
    unet.set_attn_processor({name: NaiveProcessor(name, tape) for name in before})
    alphas = pipe.scheduler.alphas_cumprod
    stride = pipe.scheduler.config.num_train_timesteps // n

    def run(mode, z, t, embeds):
        tape.mode = mode
        more = {} if added is None else {"added_cond_kwargs": added[mode]}
        return unet(z.to(unet.dtype), t, encoder_hidden_states=embeds.to(unet.dtype), **more).sample.float()

    shared = alignment.mapper[alignment.shared].tolist()  # once: reading it makes a GPU wait
    z = inversion.latents[:1].clone()
    try:
        for i, t in enumerate(inversion.timesteps):
            tape.cross = i < round(settings["cross_replace_steps"] * n)
            tape.self_names = self_names if i < round(settings["self_replace_steps"] * n) else ()
            z_source = inversion.latents[i : i + 1]
            sigma = ((1 - alphas[t]) / alphas[t]).sqrt()
            if i < round(settings["optimization_steps"] * n):
                guided = None
                for _ in range(settings["optimization_iterations"]):
                    run("source", z_source, t, source_embeds)
                    z = z.detach().requires_grad_()
                    run("target", z, t, target_embeds)
                    if guided is None:
                        maps = sum(tape.own[name].mean(0) for name in loss_names).detach()  # (pixels, tokens)
                        guided = []
                        for region in regions:
                            _, tokens, soft, _ = region
                            look = maps[:, list(tokens)].sum(1)
                            if look[soft > 0].sum() <= settings["optimization_threshold"] * look.sum():
                                guided.append(region)
                    if not guided:
                        break
                    loss = 0
                    for kind, tokens, soft, binary in guided:
                        own = [tape.own[name][..., list(tokens)].sum(-1) for name in loss_names]
                        if kind == "object":
                            s = sum(m.mean(0) for m in own) / len(own)
                            v = 0.05 + 0.9 * s / (s.max().detach() + 1e-8)
                            loss = loss + settings["oal_weight"] * (bce(1e-5 + (1 - 2e-5) * s, soft) + bce(v, soft))
                            continue
                        for name, m in zip(loss_names, own):
                            ratio = m / (m + tape.source[name][..., shared].sum(-1).detach() + 1e-6)
                            terms = (1 - (ratio * binary).sum(-1) / binary.sum()) ** 2
                            if settings.get("ccl_form") == "both":
                                terms = terms + 3 - 4 * (m * binary).sum(-1) / (m.sum(-1) + 1e-8)
                            loss = loss + settings["ccl_weight"] * terms.mean() / len(loss_names)
                    (g,) = torch.autograd.grad(loss, z)
                    z = z.detach()
                    rms = (z * dilated).square().sum().div(dilated.sum() * z.shape[1]).sqrt()
                    step = (settings["step_size"] * sigma * g).clamp(
                        -settings["max_update"] * rms, settings["max_update"] * rms
                    )
                    z = z - dilated * step
            with torch.no_grad():
                run("source", z_source, t, source_embeds)
                cond = run("target", z, t, target_embeds)
                null = run("plain", z, t, inversion.null_embed(i))
                eps = null + settings["guidance_scale"] * (cond - null)
                a, b = alphas[t], alphas[t - stride] if t >= stride else alphas[0]
                x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
                z = b.sqrt() * x0 + (1 - b).sqrt() * eps
                if i >= n - round(settings["background_blend"] * n):
                    z = dilated * z + (1 - dilated) * inversion.latents[i + 1 : i + 2]
    finally:
        unet.set_attn_processor(before)
    return z
