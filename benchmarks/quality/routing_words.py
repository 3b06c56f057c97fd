"""The words of the routing task. What held-out rows say shares no thing, fault, place, name or sentence
with what training rows say.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """What one desk looks after: things, and what can be the matter with them."""

    things: tuple[str, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """What reports are built from.

    `reports` have the slots {thing}, {fault} and {place}; `asides` name another desk's thing that works;
    `closings` have the slot {name}.
    """

    topics: dict[str, Topic]
    places: tuple[str, ...]
    names: tuple[str, ...]
    reports: tuple[str, ...]
    asides: tuple[str, ...]
    closings: tuple[str, ...]


# The desks have names of trees, so that no base knows which looks after what.
DESKS = ("alder", "birch", "cedar", "hazel", "linden", "maple", "rowan", "willow")

TRAINING = Words(
    topics={
        "alder": Topic(
            ("kitchen tap", "wash basin", "toilet", "shower head", "drain", "water pipe", "urinal", "sink"),
            ("drips all day", "is clogged", "leaks onto the tiles", "runs over", "gurgles and smells"),
        ),
        "birch": Topic(
            ("radiator", "air conditioner", "thermostat", "fan heater", "cooling unit", "boiler"),
            ("blows only cold air", "stays cold", "makes the room far too hot", "can't be turned down"),
        ),
        "cedar": Topic(
            ("ceiling lamp", "wall socket", "light switch", "fuse box", "spotlight", "desk lamp", "bulb"),
            ("flickers", "gives no power", "sparks when touched", "went dark", "hums and then goes off"),
        ),
        "hazel": Topic(
            ("door handle", "lock", "key card reader", "entrance door", "gate latch", "padlock", "hinge"),
            ("does not let anyone in", "is jammed", "won't shut any more", "squeaks and sticks"),
        ),
        "linden": Topic(
            ("waste bin", "floor", "carpet", "fridge shelf", "recycling box", "window pane", "doormat"),
            ("is full of ants", "has not been wiped for days", "is covered in crumbs", "smells of old food"),
        ),
        "maple": Topic(
            ("wireless network", "desk phone", "printer", "router", "video screen", "headset", "modem"),
            ("drops every call", "has no signal", "shows a connection error", "can't reach the server"),
        ),
        "rowan": Topic(
            ("passenger lift", "parking barrier", "car charger", "delivery van", "garage ramp", "goods lift"),
            ("stops between floors", "stays up all day", "has a flat tyre", "does not come when called"),
        ),
        "willow": Topic(
            ("office chair", "meeting table", "bookshelf", "cupboard", "sofa", "drawer", "coat rack"),
            ("has a broken leg", "wobbles badly", "lost two screws", "has a torn cover", "came apart"),
        ),
    },
    places=(
        "on the second floor",
        "in room 214",
        "in the canteen",
        "next to the copy room",
        "in the north wing",
        "in the lobby",
        "at the loading dock",
        "in the archive",
        "by the back stairs",
        "in the training room",
        "in office 31",
        "near the reception",
        "in the lab",
        "on the roof terrace",
        "in the basement",
    ),
    names=(
        "Anna Berg",
        "Tom Hale",
        "Ruth Okafor",
        "Piotr Zielinski",
        "Maria Lopez",
        "Jonas Weber",
        "Li Wen",
        "Carla Rossi",
        "Ahmed Nasser",
        "Emma Clarke",
        "Viktor Hansen",
        "Sofia Duarte",
        "Peter Novak",
        "Grace Mbeki",
        "Hugo Martin",
        "Nina Petrova",
        "Owen Price",
        "Yuki Tanaka",
        "Lena Fischer",
        "Raj Patel",
    ),
    reports=(
        "The {thing} {place} {fault}.",
        "Please send someone: the {thing} {place} {fault}.",
        "Since Monday the {thing} {place} {fault}.",
        "Hello, I want to report that the {thing} {place} {fault}.",
        "We have a problem {place}. The {thing} {fault}.",
        "Good morning! The {thing} {fault}. You will find it {place}.",
        "It happened again: the {thing} {place} {fault}.",
        "My team can't work because the {thing} {place} {fault}.",
        "Could you look at the {thing} {place}? It {fault}.",
        "A visitor reported me that the {thing} {place} {fault}.",
        "This is the third time I write. The {thing} {place} {fault}.",
        "Not urgent, but the {thing} {place} {fault}.",
    ),
    asides=(
        "The {other} is fine.",
        "Thanks for mending the {other} last week.",
        "It has nothing to do with the {other}, which works.",
        "Somebody looked at the {other} already, and that one is in order.",
        "The {other} beside it is as good as new.",
    ),
    closings=(
        "Regards, {name}",
        "Thank you, {name}",
        "{name}, extension 40",
        "Best wishes from {name}",
        "Yours, {name}",
        "- {name}",
        "Please call {name} when it is done.",
        "",
    ),
)

HELDOUT = Words(
    topics={
        "alder": Topic(
            ("cistern", "bathtub", "faucet", "sewer grate", "dishwasher hose"),
            ("is dripping without end", "has flooded the corner", "won't flush", "backs up with dirty water"),
        ),
        "birch": Topic(
            ("ventilation shaft", "heat pump", "warm-air vent", "underfloor heating"),
            ("pumps out freezing draughts", "leaves us shivering", "turned the place into a sauna"),
        ),
        "cedar": Topic(
            ("chandelier", "power strip", "neon tube", "circuit breaker", "dimmer"),
            ("trips whenever it is used", "blinks like mad", "is dead and we sit in the dark"),
        ),
        "hazel": Topic(
            ("deadbolt", "revolving gate", "badge scanner", "shutter", "safe"),
            ("refuses every key", "swings open by itself", "keeps us shut out", "can't be bolted"),
        ),
        "linden": Topic(
            ("rubbish container", "stairwell", "dustbin", "tiled wall", "compost pail"),
            ("attracts mice", "is sticky with spilt coffee", "is filthy", "overflows with litter"),
        ),
        "maple": Topic(
            ("internet cable", "conference speaker", "fax machine", "network hub", "webcam"),
            ("keeps going offline", "cuts out during meetings", "has been disconnected", "finds no host"),
        ),
        "rowan": Topic(
            ("escalator", "forklift", "shuttle bus", "elevator", "bicycle stand"),
            ("got stuck halfway", "won't start its engine", "blocks the driveway", "halts with a jolt"),
        ),
        "willow": Topic(
            ("stool", "filing cabinet", "armchair", "whiteboard easel", "bench"),
            ("collapsed under me", "has a cracked seat", "tips over", "is missing its backrest"),
        ),
    },
    places=(
        "behind the auditorium",
        "at counter five",
        "along the west corridor",
        "inside suite 907",
        "beneath the atrium",
        "opposite the cloakroom",
        "upstairs from the gym",
        "within the annexe",
    ),
    names=(
        "Ingrid Solheim",
        "Dmitri Volkov",
        "Chipo Moyo",
        "Beatriz Almeida",
        "Finn Gallagher",
        "Aiko Mori",
        "Zainab Yusuf",
        "Marek Dvorak",
        "Celeste Moreau",
        "Tobias Lindqvist",
    ),
    reports=(
        "Just so you know, the {thing} {place} {fault}.",
        "Colleagues complain that the {thing} {place} {fault}.",
        "Can anything be done? Our {thing} {place} {fault}.",
        "As of this afternoon, the {thing} {place} {fault}.",
        "Kindly arrange a repair; the {thing} {place} {fault}.",
        "I noticed on my round that the {thing} {place} {fault}.",
    ),
    asides=(
        "Don't bother with the {other}; no trouble there.",
        "By contrast, the {other} behaves perfectly.",
        "Yesterday's work on the {other} was a success, cheers.",
    ),
    closings=("Cheers, {name}", "Sincerely, {name}", "Signed: {name}", "Contact me under {name}."),
)
