"""A small Qwen2-architecture checkpoint with a tokenizer of its own, for the quickstart and for tests.

    python -m hybridrl.data.tiny_model --out models/tiny --data data/arithmetic/sft_train.parquet

The folder is what transformers, vLLM and the trainers load: config.json, model.safetensors (random weights from a
seed), a byte-level BPE tokenizer trained on the data with each digit a token, a ChatML template,
generation_config.json.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from hybridrl.data.files import read_table
from hybridrl.data.preprocess.rows import run

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def texts_of(path: str | Path) -> list[str]:
    """Every text of a data file that a model will read or write: messages, responses, worked answers."""
    texts = []
    for item in read_table(path, "--data").to_pylist():
        if not item.get("prompt"):
            raise ValueError(f"--data: {path} needs a 'prompt' in each row: messages or a string")
        prompt = item["prompt"]
        texts += [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        texts += [item["response"]] if item.get("response") else []
        answer = (item.get("extra_info") or {}).get("answer")
        texts += [answer] if answer else []
    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer (any text round-trips) of at most `vocab_size` tokens; digits never merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, START, END], initial_alphabet=alphabet,
                                  show_progress=False)
    roles = [f"{role}\n" for role in ("system", "user", "assistant")]
    core.train_from_iterator([*texts, *roles], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END,
                                        additional_special_tokens=[START], clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(tokenizer, args: argparse.Namespace):
    """The Qwen2Config of `args`. ValueError for a shape that vLLM on CPU or two tensor-parallel ranks cannot take."""
    from transformers import Qwen2Config

    heads, kv_heads = args.num_attention_heads, args.num_key_value_heads
    if args.hidden_size % heads or args.hidden_size // heads < 32:
        raise ValueError(f"--hidden_size {args.hidden_size} over --num_attention_heads {heads}: each head needs at "
                         "least 32 (vLLM's attention on CPU takes no less), and all the same")
    if heads % kv_heads or kv_heads % 2:
        raise ValueError(f"--num_key_value_heads {kv_heads} must be even (two tensor-parallel ranks) and divide "
                         f"--num_attention_heads {heads}")
    return Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=args.hidden_size, num_hidden_layers=args.num_layers,
        intermediate_size=args.intermediate_size or 4 * args.hidden_size, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=args.max_position_embeddings,
        tie_word_embeddings=args.tie_word_embeddings, initializer_range=args.initializer_range,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        dtype=args.dtype)


def make_checkpoint(args: argparse.Namespace) -> None:
    """Write the checkpoint folder `args.out`, whole or not at all. ValueError when it exists and is no checkpoint."""
    import torch
    from transformers import GenerationConfig, Qwen2ForCausalLM

    out = args.out.expanduser().absolute()
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise ValueError(f"--out {out} exists and holds no model: give another folder")
    tokenizer = train_tokenizer(texts_of(args.data), args.vocab_size)
    config = make_config(tokenizer, args)
    torch.manual_seed(args.seed)
    model = Qwen2ForCausalLM(config).to(getattr(torch, args.dtype))
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folder.chmod(0o755)  # mkdtemp's folder, and safetensors' file, are for the owner alone
        (folder / "model.safetensors").chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {config.vocab_size} "
          f"({len(tokenizer)} tokens), {args.dtype}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--data", type=Path, required=True, help="Parquet file whose texts train the tokenizer")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--num_key_value_heads", type=int, default=2)
    parser.add_argument("--intermediate_size", type=int, help="default: 4 * hidden_size")
    parser.add_argument("--vocab_size", type=int, default=320, help="most tokens the tokenizer may have")
    parser.add_argument("--max_position_embeddings", type=int, default=1024)
    parser.add_argument("--tie_word_embeddings", action="store_true")
    parser.add_argument("--initializer_range", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


def main() -> None:
    make_checkpoint(parse())


if __name__ == "__main__":
    run(main)
