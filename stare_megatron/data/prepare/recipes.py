"""The data sets by name. A new one is one entry here; docs/data.md describes each."""

from __future__ import annotations

from stare_megatron.data.prepare import answers, programs
from stare_megatron.data.prepare.types import FileLayout, Recipe

_CHAT = "reward_model.ground_truth"
_PROBLEM_ANSWER = FileLayout("problem", "answer", answers.plain)
_QUESTION_ANSWER = FileLayout("question", "answer", answers.plain)
_INPUT_OUTPUT = FileLayout("input", "output", answers.plain)
_INPUT_TESTS = FileLayout(
    "question", "input_output", answers.plain, "problem_id", tests=programs.cases, more=programs.with_starter
)
_BOXED_SOLUTION = FileLayout("problem", "solution", answers.in_box)

_ALL = (
    Recipe(
        name="dapo-math-17k",
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        patterns=("data/*.parquet",),
        layouts=(
            FileLayout("prompt", _CHAT, answers.plain, "extra_info.index"),
            FileLayout("prompt", "solution", answers.plain, "extra_info.index"),  # the processed edition
            _PROBLEM_ANSWER,
        ),
    ),
    Recipe(
        name="deepscaler",
        hub="agentica-org/DeepScaleR-Preview-Dataset",
        patterns=("deepscaler.json", "*.json", "*.parquet"),
        layouts=(_PROBLEM_ANSWER,),
    ),
    Recipe(
        name="skywork-or1",
        hub="Skywork/Skywork-OR1-RL-Data",
        patterns=("data/math-*.parquet",),
        split="math",
        layouts=(FileLayout("prompt", _CHAT, answers.json_list, "extra_info.index"),),
    ),
    Recipe(
        name="polaris",
        hub="POLARIS-Project/Polaris-Dataset-53K",
        patterns=("*.jsonl", "*.parquet", "data/*.parquet"),
        layouts=(_PROBLEM_ANSWER,),
    ),
    Recipe(
        name="orz",
        hub="Open-Reasoner-Zero/orz_math_57k_collection",
        patterns=("*.json", "*.jsonl", "*.parquet", "data/*.parquet"),
        # A row is a list of two messages.
        layouts=(FileLayout("0.value", "1.ground_truth.value", answers.plain),),
    ),
    Recipe(
        name="big-math",
        hub="SynthLabsAI/Big-Math-RL-Verified",
        patterns=("data/{split}-*.parquet",),
        layouts=(_PROBLEM_ANSWER,),
    ),
    Recipe(
        name="numina-math-1.5",
        hub="AI-MO/NuminaMath-1.5",
        patterns=("data/{split}-*.parquet",),
        layouts=(_PROBLEM_ANSWER,),
        unsuitable=answers.no_answer,
    ),
    Recipe(
        name="numina-math-cot",
        hub="AI-MO/NuminaMath-CoT",
        patterns=("data/{split}-*.parquet",),
        layouts=(_BOXED_SOLUTION,),
        unsuitable=answers.no_box,
    ),
    Recipe(
        name="openr1-math",
        hub="open-r1/OpenR1-Math-220k",
        patterns=("data/{split}-*.parquet",),
        layouts=(FileLayout("problem", "answer", answers.plain, "uuid"),),
        unsuitable=answers.no_answer,
    ),
    Recipe(
        name="apps",
        hub="codeparrot/apps",
        patterns=("{split}.jsonl", "*/{split}-*.parquet", "data/{split}-*.parquet"),
        layouts=(_INPUT_TESTS,),
    ),
    Recipe(
        name="taco",
        hub="likaixin/TACO-verified",
        patterns=("*.parquet", "data/*.parquet", "*.jsonl"),
        layouts=(_INPUT_TESTS,),
    ),
    Recipe(
        name="deepcoder",
        hub="agentica-org/DeepCoder-Preview-Dataset",
        patterns=("{split}/train-*.parquet",),
        split="taco",
        layouts=(FileLayout("problem", "tests", answers.plain, tests=programs.cases, more=programs.with_starter),),
    ),
    Recipe(
        name="mbpp",
        hub="google-research-datasets/mbpp",
        patterns=("full/{split}-*.parquet",),
        layouts=tuple(
            FileLayout(key, "test_list", answers.plain, "task_id", tests=programs.asserts, more=programs.with_asserts)
            for key in ("text", "prompt")  # the full edition, the sanitized one
        ),
    ),
    Recipe(
        name="humaneval",
        hub="openai/openai_humaneval",
        patterns=("openai_humaneval/test-*.parquet",),
        split="test",
        role="eval",
        layouts=(FileLayout("prompt", "test", answers.plain, "task_id", tests=programs.check_function),),
    ),
    Recipe(
        name="gsm8k",
        hub="openai/gsm8k",
        patterns=("main/{split}-*.parquet",),
        layouts=(FileLayout("question", "answer", answers.after_hashes),),
        check=answers.integer_or_decimal,
    ),
    Recipe(
        name="math",
        hub="EleutherAI/hendrycks_math",
        patterns=("*/{split}-*.parquet",),
        layouts=(_PROBLEM_ANSWER, _BOXED_SOLUTION),
    ),
    Recipe(
        name="math-500",
        hub="HuggingFaceH4/MATH-500",
        patterns=("test.jsonl",),
        split="test",
        role="eval",
        layouts=(FileLayout("problem", "answer", answers.plain, "unique_id"),),
    ),
    Recipe(
        name="aime-train",
        hub="gneubig/aime-1983-2024",
        patterns=("*.csv",),
        layouts=(_PROBLEM_ANSWER, FileLayout("Question", "Answer", answers.plain, "ID")),
        check=answers.aime,
    ),
    Recipe(
        name="aime24",
        hub="HuggingFaceH4/aime_2024",
        patterns=("data/*.parquet",),
        role="eval",
        layouts=(
            FileLayout("problem", "answer", answers.plain, "id"),
            FileLayout("Problem", "Answer", answers.plain, "ID"),  # Maxwell-Jia/AIME_2024
            _BOXED_SOLUTION,  # math-ai/aime24
            _INPUT_OUTPUT,  # ReTool
        ),
        check=answers.aime,
    ),
    Recipe(
        name="aime25",
        hub="math-ai/aime25",
        patterns=("test.jsonl",),
        split="test",
        role="eval",
        layouts=(
            FileLayout("problem", "answer", answers.plain, "id"),
            _QUESTION_ANSWER,  # opencompass/AIME2025
            _INPUT_OUTPUT,  # ReTool
        ),
        check=answers.aime,
    ),
    Recipe(
        name="amc23",
        hub="math-ai/amc23",
        patterns=("test-*.parquet", "data/test-*.parquet"),
        split="test",
        role="eval",
        layouts=(
            FileLayout("problem", "answer", answers.plain, "id"),
            FileLayout("question", "answer", answers.plain, "id"),
        ),
    ),
    Recipe(
        name="minerva",
        hub="math-ai/minervamath",
        patterns=("test.jsonl",),
        split="test",
        role="eval",
        layouts=(
            FileLayout("problem", "answer", answers.alternatives, "idx"),
            FileLayout("question", "answer", answers.alternatives),
            _BOXED_SOLUTION,
        ),
    ),
    Recipe(
        name="olympiadbench",
        hub="math-ai/olympiadbench",
        patterns=("test*", "OE_TO_maths_en_COMP/*.parquet"),
        split="test",
        role="eval",
        layouts=(
            FileLayout("question", "final_answer", answers.all_of, "id"),
            FileLayout("problem", "answer", answers.all_of, "id"),
            FileLayout("problem", "final_answer", answers.all_of, "id"),
        ),
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
