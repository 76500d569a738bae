"""Prompts for the draft head of the default model: public questions, passages with instructions, and templates.

    python benchmarks/draft_prompts.py --data FOLDER > prompts.jsonl

FOLDER holds gsm8k/, arena-hard/, bfcl-tools/ and public-domain-text/, and spec-bench/ and mt-bench/, whose questions
are left out of everything (80 of GSM8K's are Spec-Bench's mathematics). The order is mixed by --seed, so any head of
the output is a sample of the whole.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOPICS = """volcanoes|photosynthesis|black holes|the French Revolution|the Silk Road|bread baking|jazz music|chess|
bees|coral reefs|electric cars|the Roman Empire|DNA|vaccines|inflation|supply and demand|democracy|the water cycle|
penguins|machine learning|operating systems|the internet|quantum computing|renewable energy|solar panels|wind
turbines|coffee|tea ceremonies|mountain climbing|marathon training|yoga|meditation|sleep|nutrition|the human heart|
the immune system|antibiotics|the moon landing|Mars exploration|the Great Wall of China|ancient Egypt|the
Renaissance|Leonardo da Vinci|Marie Curie|Isaac Newton|Albert Einstein|William Shakespeare|Jane Austen|classical
music|the violin|photography|oil painting|film editing|public speaking|time management|remote work|job interviews|
negotiation|personal finance|compound interest|the stock market|blockchain|cybersecurity|passwords|databases|
recursion|sorting algorithms|neural networks|robots|self-driving cars|3D printing|bridges|skyscrapers|railways|
sailing|dolphins|elephants|wolves|rainforests|deserts|glaciers|earthquakes|hurricanes|climate change|recycling|
composting|urban gardening|bicycles|football|basketball|the Olympic Games|tennis|swimming|pasta|sushi|chocolate|
cheese|wine|spices|street food|vegetarian cooking|festivals|weddings|birthday parties|travelling alone|Japan|Brazil|
Kenya|Iceland|India|Canada|New Zealand|Morocco|Vietnam|Mexico|Paris|New York|Tokyo|Cairo|Sydney|libraries|museums|
education|homework|mathematics|geometry|probability|prime numbers|calculus|gravity|magnetism|electricity|light|
sound|atoms|the periodic table|acids|plastics|gold|diamonds|fossils|dinosaurs|evolution|ecosystems|butterflies|
spiders|owls|cats|dogs|horses|the ocean|lighthouses|castles|knights|pirates|dragons|ghosts|time travel|space
stations|aliens|the future of work|friendship|courage|honesty|happiness|loneliness|leadership|teamwork|creativity|
memory|habits|fear|anger|forgiveness|justice|human rights|ethics|philosophy|logic|language learning|translation|
poetry|journalism|advertising|social media|video games|board games|puzzles|origami|knitting|carpentry|pottery|
gardening|fishing|camping|astronomy|telescopes|the Big Bang|comets|rocket engines|aeroplanes|submarines|batteries|
semiconductors|mobile phones|email|spreadsheets|open-source software|web browsers|search engines|cloud computing|
compilers|version control|unit testing|hospitals|first aid|dentistry|mental health|ageing|childhood|parenting|
schools|universities|the printing press|the Black Death|the Industrial Revolution|the Cold War|World War II|the
United Nations|constitutions|elections|taxes|banks|insurance|small businesses|startups|customer service|marketing
plans|logistics|farming|irrigation|soil|forests|rivers|bridges in Europe|lakes|islands|maps|calendars|clocks|money|
trade|slavery|women's suffrage|immigration|cities|villages|fashion|perfume|architecture|opera|ballet|stand-up
comedy|cartoons|novels|detective stories|fairy tales|myths"""

TASKS = """What is the most important thing to know about {t}?|Explain {t} to a ten-year-old.|What are {t}?|Write a
short story about {t}.|Write a poem about {t}.|List five facts about {t}.|What are the advantages and disadvantages
of {t}?|Give me a beginner's guide to {t}.|Write a blog post introduction about {t}.|How has {t} changed over the
last hundred years?|Write an email to a friend about {t}.|Compare {t} and {u}.|What do {t} and {u} have in common?|
Write a dialogue between a teacher and a student about {t}.|Summarize the history of {t} in three paragraphs.|What
are common misconceptions about {t}?|Give ten tips related to {t}.|Write a product description inspired by {t}.|You
are an expert on {t}. Answer the question: why does it matter?|Create a lesson plan about {t}.|Write a speech about
{t} for a general audience.|Write three quiz questions about {t} with answers.|Explain step by step how to learn
more about {t}.|Describe {t} in one sentence, then in one paragraph.|Write a news headline and a short article about
{t}.|Make a table comparing {t} with {u}.|What would the world be like without {t}?|Imagine you are a time
traveller. Tell me about {t}.|Write a letter of complaint about {t}.|Give me an outline for an essay on {t} and
{u}.|Who are famous people connected with {t}?|When and where did {t} begin?|Where can I learn about {t}?|How does
{t} work?|Why do people like {t}?|Return a JSON object with the keys "topic", "summary" and "keywords" about {t}.|
Write a haiku about {t}.|Rewrite this sentence in a formal tone: "I really like {t}, it is super cool."|Correct the
grammar: "{t} are very much important for peoples since long time ago."|Is {t} related to {u}? Explain your
reasoning.|Write a short review of a book about {t}.|Debate: is {t} more useful than {u}?|Give me a schedule for one
week that includes {t}.|What are the main causes and effects of {t}?|Translate to French: "I would like to know more
about {t}."|Classify these as old or new: {t}, {u}."""

CODE = """reverses a string|checks whether a number is prime|computes the factorial of n|returns the n-th Fibonacci
number|sorts a list with bubble sort|sorts a list with merge sort|finds the largest element of a list|counts the
words of a text|removes duplicates from a list|checks whether a string is a palindrome|merges two sorted lists|
computes the greatest common divisor|converts Celsius to Fahrenheit|reads a CSV file and sums a column|finds the
most common character|flattens a nested list|implements binary search|implements a stack|implements a queue with two
stacks|implements a linked list|validates an email address|counts vowels|generates a random password|parses a date|
computes the average of a list|transposes a matrix|multiplies two matrices|finds all anagrams of a word|computes
compound interest|rolls two dice|checks balanced parentheses|converts a number to binary|converts Roman numerals to
numbers|finds the longest common prefix|rotates a list by k places|groups words by their first letter|downloads a
web page|retries a function three times|caches results of a function|prints a multiplication table|splits a list
into chunks|finds pairs that sum to a target|computes the median|computes the standard deviation|writes a dictionary
to a JSON file|counts lines of a file|traverses a binary tree in order|computes the depth of a binary tree|runs a
breadth-first search|runs Dijkstra's algorithm|solves the towers of Hanoi"""

CODE_TASKS = """Write a Python function that {c}.|Write a JavaScript function that {c}.|Write a Python program that
{c}, with comments.|Explain how you would write a function that {c}.|Write a C function that {c}.|Write unit tests
for a Python function that {c}."""

SUMS = """A shop sells {a} apples on Monday and {b} on Tuesday. Each apple costs ${c}. How much money does it make?|
What is {a} plus {b} times {c}?|{n} has {a} marbles and gives {b} away, then buys {c} bags with {b} marbles each.
How many marbles does {n} have?|A train travels {a} kilometres in {c} hours. What is its average speed?|If a
rectangle is {a} cm long and {b} cm wide, what are its area and perimeter?|{n} saves ${b} every week. How many weeks
until {n} has ${a}?|A recipe for {c} people needs {b} grams of flour. How much flour is needed for {a} people?|Solve
for x: {c}x + {b} = {a}."""

FACTS = """What is the capital of {p}?|What language is spoken in {p}?|What currency is used in {p}?|How many people
live in {p}?|Where is {p}?|What is {p} famous for?|Which countries border {p}?|Who invented {i}?|When was {i}
invented?|What is {i} used for?|What was used before {i}?|Who wrote {w}?|When was {w} published?|Who is the main
character of {w}?|What is {w} about?|Where does {w} take place?"""

PLACES = """France|Peru|Norway|Egypt|Thailand|Australia|Poland|Chile|Nigeria|South Korea|Spain|Turkey|Argentina|
Finland|Greece|Indonesia|Ireland|Italy|Jamaica|Kazakhstan|Lebanon|Mongolia|Nepal|Oman|Pakistan|Portugal|Romania|
Sweden|Switzerland|Tanzania|Ukraine|Uruguay|Zambia|Austria|Belgium|Cuba|Denmark|Ethiopia|Ghana|Hungary"""

INVENTIONS = """the telephone|the steam engine|the light bulb|the World Wide Web|the microscope|penicillin|dynamite|
the piano|the radio|television|the transistor|the thermometer|the zipper|paper|gunpowder|the compass|the airplane|
the car|the bicycle|the camera|the refrigerator|the microwave oven|the typewriter|the barometer|the laser"""

BOOKS = """Hamlet|Frankenstein|Moby-Dick|War and Peace|Don Quixote|The Odyssey|Dracula|Great Expectations|Jane Eyre|
Emma|The Time Machine|Treasure Island|Little Women|Alice in Wonderland|Gulliver's Travels|Robinson Crusoe|Crime and
Punishment|Les Misérables|Romeo and Juliet|The Jungle Book|Around the World in Eighty Days|Walden"""

NAMES = "Anna|Ben|Carla|David|Emma|Farid|Grace|Hiro|Ines|Jamal|Kira|Liam|Maya|Noah|Olga|Priya|Quinn|Rosa|Sam|Tara"

PASSAGE_TASKS = """Summarize the following text in three sentences.|What is the following passage about?|List the
people who are named in this text and what they do.|Rewrite the following passage in simple modern English.|Answer
from the text: what happens, and why?|Extract the key points of the following text as a list.|Give the following
text a title and explain your choice.|Continue the following text.|Who speaks in the following passage, and what do
they want?"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--templates", type=int, default=2200, help="prompts out of templates (default: 2200)")
    parser.add_argument("--passages", type=int, default=450, help="prompts with a passage (default: 450)")
    parser.add_argument("--tools", type=int, default=450, help="prompts with tools (default: 450)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and the order (default: 0)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    chats = [user(row["question"]) for name in ("test", "train_first64") for row in rows(args.data, f"gsm8k/{name}")]
    chats += [user(row["prompt"]) for row in rows(args.data, "arena-hard/question_v0.1")]
    tools = [chat for path in sorted((args.data / "bfcl-tools").glob("BFCL*.gz")) for chat in tool_chats(path)]
    chats += rng.sample(tools, min(args.tools, len(tools)))
    chats += [user(text) for text in passages(args.data, args.passages, rng)]
    chats += [user(text) for text in templates(args.templates, rng)]
    held_out = set(benchmark_questions(args.data))
    kept = [chat for chat in chats if plain(chat[-1]["content"]) not in held_out]
    rng.shuffle(kept)
    for chat in kept:
        print(json.dumps({"messages": chat}, ensure_ascii=False))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def plain(text: str) -> str:
    """`text` for comparison: words alone."""
    return " ".join(re.findall(r"\w+", text.lower()))


def rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    compressed = path.with_suffix(".jsonl.gz")
    with gzip.open(compressed, "rt", encoding="utf-8") if compressed.exists() else path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def benchmark_questions(folder: Path) -> Iterator[str]:
    for name in ("spec-bench/question_open", "mt-bench/mt_bench_question", "mt-bench/vicuna_bench_question"):
        yield from (plain(turn) for row in rows(folder, name) for turn in row["turns"])


def tool_chats(path: Path) -> Iterator[list[dict[str, str]]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            system = "You are an assistant with access to these tools. Answer with the calls as a JSON list.\n"
            messages = row["question"][0]
            yield [{"role": "system", "content": system + json.dumps(row["function"])}, *messages]


def passages(folder: Path, count: int, rng: random.Random) -> Iterator[str]:
    """An instruction before or behind 400 to 3,600 characters of a book, from a paragraph's start."""
    tasks = split(PASSAGE_TASKS)
    for number in range(count):
        name = ("pride_and_prejudice", "tinyshakespeare")[number % 3 == 2]
        with gzip.open(folder / "public-domain-text" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
            text = file.read()
        start = text.find("\n\n", rng.randrange(len(text) - 5000)) + 2
        passage = text[start : start + int(400 * 9 ** rng.random())].rsplit(" ", 1)[0].strip()
        task = rng.choice(tasks)
        yield f"{task}\n\n{passage}" if rng.random() < 0.6 else f"{passage}\n\n{task}"


def templates(count: int, rng: random.Random) -> Iterator[str]:
    topics, tasks, names = split(TOPICS), split(TASKS), split(NAMES)
    code, code_tasks, sums, facts = split(CODE), split(CODE_TASKS), split(SUMS), split(FACTS)
    places, inventions, books = split(PLACES), split(INVENTIONS), split(BOOKS)
    for _ in range(count):
        kind = rng.random()
        if kind < 0.10:
            p, i, w = rng.choice(places), rng.choice(inventions), rng.choice(books)
            yield rng.choice(facts).format(p=p, i=i, w=w)
        elif kind < 0.75:
            t, u = rng.sample(topics, 2)
            yield rng.choice(tasks).format(t=t, u=u)
        elif kind < 0.88:
            yield rng.choice(code_tasks).format(c=rng.choice(code))
        else:
            a, b, c = rng.randint(20, 500), rng.randint(2, 20), rng.randint(2, 12)
            yield rng.choice(sums).format(a=a, b=b, c=c, n=rng.choice(names))


def split(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("|")]


if __name__ == "__main__":
    main()
