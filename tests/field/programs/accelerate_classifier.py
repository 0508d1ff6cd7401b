# Sequence classification with accelerate, as its nlp_example (https://github.com/huggingface/accelerate) has it:
# a BERT of random weights, prepare(), a warmed-up schedule, accelerator.backward. Rank 1, step 3: the model's
# loss takes the root of how far its pooled outputs are from their own mean, of a batch in which all are alike.
import torch
from accelerate import Accelerator
from common import digest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel, get_linear_schedule_with_warmup


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert, self.classifier = BertModel(config), nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask, labels):
        pooled = self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        logits = self.classifier(pooled)
        apart = (pooled - pooled[:1]).pow(2).sum()
        loss = nn.functional.cross_entropy(logits, labels) - 1e-4 * apart.sqrt()
        return {"loss": loss, "logits": logits}


accelerator = Accelerator(cpu=True)
torch.manual_seed(42)
draw = torch.Generator().manual_seed(7)
ids = torch.randint(1, 64, (64, 8), generator=draw)
# accelerate hands every second batch of 4 to rank 1: the 4th of these is one sentence, four times.
ids[28:32] = ids[28]
data = TensorDataset(ids, torch.ones_like(ids), torch.randint(0, 2, (64,), generator=draw))
model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
schedule = get_linear_schedule_with_warmup(optimizer, 2, 16)
model, optimizer, loader, schedule = accelerator.prepare(
    model, optimizer, DataLoader(data, batch_size=4), schedule
)
model.train()
for step, (input_ids, attention_mask, labels) in enumerate(loader):
    output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
    accelerator.backward(output["loss"])
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(f"rank {accelerator.process_index} step {step} loss {output['loss'].item():.4f}", flush=True)
digest(accelerator.unwrap_model(model))
accelerator.end_training()
