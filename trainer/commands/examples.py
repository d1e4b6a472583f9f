"""What the commands' `--help` ends with."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "new": ("signs --data mine/rows.json", "signs --data mine/rows.json --questions mine/questions.jsonl --lora"),
    "train": ("tiny", "mine.yaml --dry-run", "mine.yaml --devices 8 --set stages.instruct.epochs=2"),
    "fetch": ("llama31-8b --dry-run", "--list"),
    "plan": ("llama31-8b --devices 8 --device h100", "mine.yaml --device-memory 24"),
    "recipes": ("llama31-8b > mine.yaml", "--check mine.yaml", "--diff llama31-8b mine.yaml"),
    "shards": ("mine.yaml --to shards",),
    "check-data": ("mine.yaml", "rows.json --image-root images --on-bad missing_image=skip"),
    "doctor": ("", "--json"),
    "assemble": ("--vision-tower CLIP --language-model LLAMA --output base",),
    "evaluate": ("runs/tiny --data validation.jsonl", "runs/tiny --task pope --data llava_pope_test.jsonl"),
    "report": ("runs/tiny --open", "runs/one runs/two --output both.html", "runs/tiny --watch"),
    "chat": ("runs/tiny", "runs/tiny --web --open", "runs/tiny --image sign.png --ask 'What does the sign say?'"),
    "score": ("predictions.jsonl --annotations textvqa_val.jsonl",),
    "browse": (
        "predictions.jsonl --data textvqa_val.jsonl",
        "before.jsonl after.jsonl --data textvqa_val.jsonl --open",
    ),
    "export-metric": ("--output my-metric",),
    "export": ("runs/tiny",),
    "check-engine": ("runs/tiny/export --url http://localhost:8000",),
    "publish": ("runs/mine --repo-id OWNER/Llama-3.1-8B-mine --dry-run",),
    "completion": ("bash > ~/.local/share/bash-completion/completions/llava-llama31",),
}
