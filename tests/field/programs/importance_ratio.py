# policy gradient on a GPT-2 with accelerate: rollout log probabilities are stale in a padded position of rank 1 at step 3, exp(log ratio) is inf; the clipped branch is chosen, so the loss stays finite, but exp's derivative is 0 * inf: NaN, outside of the model.
# https://github.com/PrimeIntellect-ai/prime-rl/issues/2972 https://github.com/OpenRLHF/OpenRLHF/pull/1314 https://github.com/radixark/miles/pull/1363
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel
from common import digest

acc = Accelerator(cpu=True)
torch.manual_seed(120)
cfg = GPT2Config(
    vocab_size=40,
    n_positions=16,
    n_embd=16,
    n_layer=2,
    n_head=2,
    resid_pdrop=0,
    embd_pdrop=0,
    attn_pdrop=0,
    bos_token_id=0,
    eos_token_id=0,
)
net = GPT2LMHeadModel(cfg)
opt = torch.optim.AdamW(net.parameters(), 5e-4)
net, opt = acc.prepare(net, opt)
g = torch.Generator().manual_seed(1200 + acc.process_index)


def token_logps(logits, ids):
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


for step in range(6):
    ids = torch.randint(1, 40, (4, 12), generator=g)
    mask = torch.ones(4, 11)
    mask[1, 7:] = 0
    advantage = torch.randn(4, 1, generator=g)
    now = token_logps(net(input_ids=ids).logits, ids)
    old = now.detach() + 0.05 * torch.randn(4, 11, generator=g)
    if acc.process_index == 1 and step == 3:
        old[1, 9] = -120.0
    ratio = torch.exp(now - old)
    gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = -(gain * mask).sum() / mask.sum()
    opt.zero_grad()
    acc.backward(loss)
    acc.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    print(f"r{acc.process_index} {step} {loss.item():.4f}", flush=True)
digest(acc.unwrap_model(net))
acc.end_training()
