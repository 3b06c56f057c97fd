"""The words of the orders task. What held-out rows say shares no name, item, note, colour or sentence with
what training rows say; numbers and months are drawn anew in both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What orders are built from: a letter opens, asks, says when, and maybe more, in any order.

    Slots: `openings` {customer}; `requests` {quantity} {item} {price}; `dates` {date}; `colours_said`
    {colour}; `notes_said` {note}. `express` sentences mean true, `patient` ones false.
    """

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    items: tuple[tuple[str, str], ...]
    colours: tuple[str, ...]
    notes: tuple[str, ...]
    openings: tuple[str, ...]
    requests: tuple[str, ...]
    dates: tuple[str, ...]
    date_forms: tuple[str, ...]
    express: tuple[str, ...]
    patient: tuple[str, ...]
    colours_said: tuple[str, ...]
    notes_said: tuple[str, ...]


NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 8: "eight", 10: "ten", 12: "twelve"}

TRAINING = Words(
    first_names=(
        "Anna",
        "Tom",
        "Ruth",
        "Piotr",
        "Maria",
        "Jonas",
        "Carla",
        "Ahmed",
        "Emma",
        "Viktor",
        "Sofia",
        "Peter",
        "Grace",
        "Hugo",
        "Nina",
        "Owen",
        "Yuki",
        "Lena",
        "Raj",
        "Clara",
        "Simon",
        "Eva",
        "Daniel",
        "Mira",
    ),
    last_names=(
        "Berg",
        "Hale",
        "Okafor",
        "Zielinski",
        "Lopez",
        "Weber",
        "Rossi",
        "Nasser",
        "Clarke",
        "Hansen",
        "Duarte",
        "Novak",
        "Mbeki",
        "Martin",
        "Petrova",
        "Price",
        "Tanaka",
        "Fischer",
        "Patel",
        "Stone",
        "Keller",
        "Abel",
    ),
    items=(
        ("oak shelf", "oak shelves"),
        ("desk lamp", "desk lamps"),
        ("wool blanket", "wool blankets"),
        ("coffee mug", "coffee mugs"),
        ("garden chair", "garden chairs"),
        ("wall clock", "wall clocks"),
        ("picture frame", "picture frames"),
        ("paper basket", "paper baskets"),
        ("rain coat", "rain coats"),
        ("tool box", "tool boxes"),
        ("bread knife", "bread knives"),
        ("soup bowl", "soup bowls"),
        ("bath towel", "bath towels"),
        ("door mat", "door mats"),
        ("flower pot", "flower pots"),
        ("travel bag", "travel bags"),
        ("ring binder", "ring binders"),
        ("water bottle", "water bottles"),
        ("floor cushion", "floor cushions"),
        ("kitchen scale", "kitchen scales"),
    ),
    colours=("red", "dark blue", "white", "light green", "black", "yellow", "grey", "brown"),
    notes=(
        "ring the bell twice",
        "leave it with the neighbour",
        "use the back door",
        "send the bill by post",
        "wrap it as a gift",
        "no plastic, please",
        "call before you come",
        "the lift is broken",
        "deliver after noon",
        "put our order number on the box",
        "mind the dog",
        "ask for the caretaker",
    ),
    openings=(
        "This is {customer}.",
        "My name is {customer}.",
        "Order from {customer}.",
        "Hello, {customer} here.",
        "Dear team, I am {customer}.",
        "{customer} writes to you again.",
        "Please book this for {customer}.",
        "Good day, this order is for {customer}.",
    ),
    requests=(
        "I need {quantity} {item} at {price} each.",
        "Please send {quantity} {item} for {price} apiece.",
        "We would like {quantity} {item}, {price} per piece.",
        "I order {quantity} {item}. The price is {price} each.",
        "Put down {quantity} {item} at {price}.",
        "Your offer of {price} for one is good, so make it {quantity} {item}.",
        "{quantity} {item}, please, at the list price of {price}.",
        "Can I have {quantity} {item}? You reported me {price} each.",
    ),
    dates=(
        "I need this on {date}.",
        "Deliver on {date}, please.",
        "It should be here on {date}.",
        "We are open on {date}, so come then.",
        "The day is {date}.",
        "Bring it on {date}.",
    ),
    date_forms=("{day} {month} {year}", "{month} {day}, {year}", "{day:02d}.{number:02d}.{year}"),
    express=(
        "It is urgent, so use express.",
        "Send it by express.",
        "We pay for the fast delivery.",
        "Express shipping, please.",
    ),
    patient=("There is no hurry.", "Normal shipping will do.", "", "", "The cheap delivery is fine."),
    colours_said=(
        "The colour is {colour}.",
        "All in {colour}.",
        "We want {colour} ones.",
        "Make it {colour}.",
    ),
    notes_said=(
        "Please note: {note}.",
        "One more thing: {note}.",
        "For the driver: {note}.",
        "Remark: {note}.",
    ),
)

HELDOUT = Words(
    first_names=(
        "Ingrid",
        "Dmitri",
        "Chipo",
        "Beatriz",
        "Finn",
        "Aiko",
        "Zainab",
        "Marek",
        "Celeste",
        "Tobias",
        "Leila",
        "Oscar",
    ),
    last_names=(
        "Solheim",
        "Volkov",
        "Moyo",
        "Almeida",
        "Gallagher",
        "Mori",
        "Yusuf",
        "Dvorak",
        "Moreau",
        "Lindqvist",
        "Haddad",
        "Winter",
    ),
    items=(
        ("tea kettle", "tea kettles"),
        ("bicycle pump", "bicycle pumps"),
        ("velvet curtain", "velvet curtains"),
        ("camping tent", "camping tents"),
        ("guitar stand", "guitar stands"),
        ("snow shovel", "snow shovels"),
        ("leather wallet", "leather wallets"),
        ("pepper mill", "pepper mills"),
        ("cheese board", "cheese boards"),
        ("phone charger", "phone chargers"),
    ),
    colours=("purple", "pale orange", "silver", "turquoise", "beige"),
    notes=(
        "park beside the church",
        "the code of the gate is on the sign",
        "hand it to my sister",
        "keep it dry",
        "our office has moved upstairs",
        "weekends suit us best",
        "stack everything in the garage",
    ),
    openings=(
        "Greetings from {customer}!",
        "You are reading a letter by {customer}.",
        "On behalf of {customer} I get in touch.",
        "It's me, {customer}.",
    ),
    requests=(
        "Kindly reserve {quantity} {item}, costing {price} a unit.",
        "What I'm after: {quantity} {item} ({price} per unit).",
        "Let me purchase {quantity} {item}; as agreed, one costs {price}.",
        "Our shop wishes to buy {quantity} {item} and accepts {price} for every one of them.",
    ),
    dates=(
        "Delivery must happen on {date}.",
        "Let the parcel arrive on {date}.",
        "We expect you on {date}.",
        "Mark {date} in your calendar for it.",
    ),
    date_forms=("{day} {month} {year}", "{month} {day} {year}", "{day}.{number}.{year}"),
    express=(
        "Choose the express option.",
        "Time presses: express, if possible.",
        "Quickest express courier, thanks.",
    ),
    patient=("Take your time with it.", "", "Standard post is enough for us."),
    colours_said=("As for the colour, {colour}.", "Only {colour} suits our rooms.", "Preferably {colour}."),
    notes_said=("A hint: {note}.", "Be aware: {note}.", "PS: {note}."),
)
