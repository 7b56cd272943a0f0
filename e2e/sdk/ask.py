"""Asks a model one question with the official OpenAI client and prints the streamed answer.

usage: ask.py BASE_URL MODEL QUESTION
"""

import sys

from openai import OpenAI


def main() -> None:
    base_url, model, question = sys.argv[1:]
    client = OpenAI(base_url=base_url, api_key="unused")
    stream = client.chat.completions.create(
        model=model,
        stream=True,
        temperature=0,
        messages=[{"role": "user", "content": question}],
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
