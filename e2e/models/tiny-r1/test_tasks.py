"""Tests of the generators, with the standard library only: `python3 -m unittest` in this folder."""

from __future__ import annotations

import json
import random
import unittest
from pathlib import Path

import tasks
import tokenizer
from tasks import Form


def examples(form: Form, split: tasks.Split, count: int = 300) -> list[tasks.Example]:
    rng = random.Random(f"test:{form.value}:{split}")
    return [tasks.generate(form, rng, split) for _ in range(count)]


class Solutions(unittest.TestCase):
    def test_the_steps_of_a_sum_carry(self) -> None:
        self.assertEqual(tasks.solve_sum(58, 967), "058+967\n8+7+0=15\n5+6+1=12\n0+9+1=10\n")

    def test_the_steps_of_a_negative_difference_swap_and_borrow(self) -> None:
        self.assertEqual(tasks.solve_difference(9, 12), "09-12\n9-2-0=7,0\n0-1-0=9,1\n<12-09\n2-9-0=3,1\n1-0-1=0,0\n")

    def test_equal_numbers_are_not_swapped(self) -> None:
        self.assertEqual(tasks.solve_difference(7, 7), "7-7\n7-7-0=0,0\n")

    def test_the_steps_of_a_product_carry(self) -> None:
        self.assertEqual(tasks.solve_product(47, 8), "47*8\n7*8+0=56+0=56\n4*8+5=32+5=37\n")

    def test_every_letter_is_compared(self) -> None:
        self.assertEqual(tasks.solve_count("Err", "R"), "1e r≠0\n2r r=1\n3r r=2\n")

    def test_the_last_steps_give_the_result(self) -> None:
        for form in (Form.SUM, Form.PRODUCT):
            for example in examples(form, "train"):
                lines = example.thinking.splitlines()[1:]
                digits = lines[-1].rpartition("=")[2] + "".join(line[-1] for line in reversed(lines[:-1]))
                self.assertEqual(int(digits), example.result, example.question)

    def test_the_digits_of_a_difference_give_the_result(self) -> None:
        for example in examples(Form.DIFFERENCE, "train"):
            _, negative, swapped = example.thinking.partition("<")
            lines = (swapped or example.thinking).splitlines()[1:]
            size = int("".join(line[-3] for line in reversed(lines)))
            self.assertEqual(-size if negative else size, example.result, example.question)


class Splits(unittest.TestCase):
    def test_no_problem_is_in_both_splits(self) -> None:
        for form in Form:
            trained = {example.key for example in examples(form, "train", 2000)}
            held_out = {example.key for example in examples(form, "held_out")}
            self.assertFalse(trained & held_out, form)

    def test_about_one_problem_in_twenty_is_held_out(self) -> None:
        held_out = sum(tasks.is_held_out(f"sum:{a}:{b}") for a in range(200) for b in range(200))
        self.assertAlmostEqual(held_out / 40_000, 1 / tasks.HELD_OUT_OF, delta=0.01)

    def test_real_words_are_never_trained_on(self) -> None:
        for word in ("strawberry", "mississippi", "banana"):
            self.assertTrue(tasks.is_held_out(f"count:{word}"))

    def test_the_same_seed_gives_the_same_examples(self) -> None:
        for form in Form:
            self.assertEqual(examples(form, "train", 20), examples(form, "train", 20))


class Ranges(unittest.TestCase):
    def test_known_forms_stay_in_range(self) -> None:
        for example in examples(Form.SUM, "train") + examples(Form.DIFFERENCE, "train"):
            self.assertLessEqual(max(map(int, example.key.split(":")[1:])), tasks.SUM_MAX)
        for example in examples(Form.COUNT, "train"):
            self.assertLessEqual(len(example.key.removeprefix("count:")), tasks.WORD_LETTERS_MAX)

    def test_other_questions_are_declined_without_a_number(self) -> None:
        for example in examples(Form.OTHER, "train"):
            self.assertIsNone(example.result)
            self.assertIsNone(tasks.result_of(example.completion()))

    def test_the_last_box_is_the_result(self) -> None:
        self.assertEqual(tasks.result_of("\\boxed{1} no, \\boxed{-23}"), -23)
        for text in ("", "\\boxed{", "\\boxed{}", "\\boxed{a}", "23"):
            self.assertIsNone(tasks.result_of(text), text)


class TokenizerFiles(unittest.TestCase):
    def test_the_committed_tokenizer_is_fresh(self) -> None:
        folder = Path(__file__).parent
        for name, content in (("tokenizer.json", tokenizer.tokenizer_json()), ("tokenizer_config.json", tokenizer.tokenizer_config())):
            self.assertEqual(json.loads((folder / name).read_text(encoding="utf-8")), content, f"{name}: run tokenizer.py again")

    def test_every_merge_is_made_of_known_tokens(self) -> None:
        vocabulary = tokenizer.vocabulary()
        for left, right in tokenizer.merges():
            self.assertTrue({left, right, left + right} <= vocabulary.keys(), (left, right))

    def test_no_merge_joins_plain_letters_or_digits(self) -> None:
        for left, right in tokenizer.merges():
            self.assertFalse(left.isascii() and left.isalnum(), (left, right))


if __name__ == "__main__":
    unittest.main()
