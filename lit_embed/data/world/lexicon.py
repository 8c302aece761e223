"""The closed vocabulary of the built-in world: concepts, each with forms of documents and forms of questions.

A table has one concept a line, ``document forms | question forms``; no word belongs to two concepts or to both sides.
The order of the lines is part of the world's definition: a concept is known by its table and its line.
"""

from typing import NamedTuple


class Concept(NamedTuple):
    """One meaning and the ways to say it."""

    document: tuple[str, ...]
    question: tuple[str, ...]


class AttributeType(NamedTuple):
    """A typed property of an entity: its values, and the phrases (``{}`` is the value) that state it of something."""

    name: str
    values: tuple[Concept, ...]
    phrases: Concept
    ask: str  # "what ... is the <kind>": how a multi-hop question asks for the value


def _concepts(table: str) -> tuple[Concept, ...]:
    sides = [line.split("|") for line in table.strip().splitlines()]
    return tuple(Concept(tuple(document.split()), tuple(question.split())) for document, question in sides)


def _phrases(document: str, question: str) -> Concept:
    return Concept(tuple(document.split(" / ")), tuple(question.split(" / ")))


KINDS = _concepts("""
vessel galleon | ship boat
goblet chalice | cup mug
turret spire | tower steeple
lantern beacon | lamp light
blade rapier | sword dagger
effigy sculpture | statue figure
timepiece chronometer | clock watch
viaduct causeway | bridge crossing
tome volume | book manual
throne stool | chair seat
tambour kettledrum | drum percussion
chime gong | bell ringer
cloak mantle | coat jacket
atlas chart | map plan
wagon carriage | cart wheelbarrow
visor guise | mask disguise
casket coffer | box chest
signet circlet | ring band
speculum reflector | mirror pierglass
pavilion marquee | tent canopy
""")

COLOURS = _concepts("""
crimson scarlet | red ruddy
azure cobalt | blue navy
emerald viridian | green grassy
saffron lemon | yellow sunny
ebony sable | black inky
alabaster chalky | white snowy
umber chestnut | brown muddy
ashen slate | grey smoky
violet plum | purple lilac
rose fuchsia | pink blush
tangerine apricot | orange carrot
teal cyan | turquoise aqua
ecru tan | beige oatmeal
maroon burgundy | wine claret
khaki olive | drab mossy
gilded aureate | golden honeyed
argent platinum | silvery moonlit
sienna terracotta | rust cinnamon
indigo sapphire | midnight twilight
pearly opaline | milky creamy
""")

MATERIALS = _concepts("""
timber oak | wood planks
granite basalt | stone rock
iron steel | metal ore
bullion nuggets | gold ingots
sterling electrum | silver plate
crystal quartz | glass panes
porcelain ceramic | clay earthenware
linen cotton | cloth fabric
hide rawhide | leather skin
parchment vellum | paper sheets
antler tusk | bone horn
hemp twine | rope cord
beeswax tallow | wax paraffin
travertine dolomite | marble limestone
masonry blocks | brick rubble
thatch wicker | straw reeds
brass copper | bronze alloy
glacier permafrost | ice icicles
fleece worsted | wool yarn
nacre conch | shell seashells
""")

MAKERS = _concepts("""
blacksmith farrier | smith metalworker
joiner cabinetmaker | carpenter woodworker
apothecary pharmacist | chemist druggist
physician surgeon | doctor medic
mariner seafarer | sailor seaman
tailor seamstress | dressmaker needleworker
scribe copyist | writer author
chef pastrycook | cook baker
tutor instructor | teacher schoolmaster
minstrel bard | singer musician
gaoler warden | jailer guard
soldier trooper | warrior fighter
shepherd drover | herder cowboy
merchant vendor | trader seller
burglar bandit | thief robber
astronomer stargazer | scientist scholar
cultivator ploughman | farmer grower
magician conjurer | wizard sorcerer
jester clown | comedian joker
gardener botanist | planter florist
""")

OWNERS = _concepts("""
monarch sovereign | king ruler
priest cleric | vicar pastor
infant toddler | baby child
widow spinster | lady woman
banker financier | lender moneyman
judge magistrate | referee arbiter
envoy ambassador | diplomat messenger
hermit recluse | loner outcast
orphan foundling | stray waif
general commander | captain chief
tenant lodger | renter boarder
hunter trapper | stalker huntsman
pilgrim wanderer | backpacker tourist
butler valet | servant footman
nephew niece | cousin relative
baron duke | noble lord
mayor alderman | councillor official
beggar pauper | vagrant tramp
collector curator | hoarder keeper
informer mole | agent snoop
""")

PLACES = _concepts("""
harbour dock | port marina
abbey monastery | convent cloister
citadel fortress | castle stronghold
woodland grove | forest trees
meadow pasture | field lawn
summit peak | mountain hilltop
brook stream | river creek
lagoon pond | lake pool
cavern grotto | cave den
inn tavern | pub bar
bazaar market | shop store
academy college | school campus
infirmary clinic | hospital ward
bakehouse scullery | kitchen pantry
crypt tomb | grave cemetery
coast seaside | beach shore
marsh swamp | bog wetland
orchard vineyard | farm plantation
cellar vault | basement bunker
playhouse auditorium | theatre stage
""")

EMBLEMS = _concepts("""
hound spaniel | dog puppy
feline tomcat | cat kitten
stallion mare | horse pony
serpent viper | snake adder
raven jackdaw | crow blackbird
ewe ram | sheep lamb
bull heifer | cow cattle
sow boar | pig hog
rooster hen | chicken cockerel
hare leveret | rabbit bunny
stag doe | deer fawn
trout salmon | fish carp
moth beetle | insect fly
toad newt | frog tadpole
falcon hawk | eagle buzzard
rat vole | mouse rodent
lynx panther | leopard wildcat
grizzly cub | bear teddy
gander drake | goose duck
wyvern hydra | dragon monster
""")

PURPOSES = _concepts("""
angling trawling | casting netting
feasting banqueting | dining eating
duelling combat | fighting battle
worship devotion | prayer praying
slumber repose | sleep resting
barter commerce | trade selling
education tuition | teaching lessons
voyaging navigation | journeys touring
minuets waltzing | dancing ballet
wagering betting | gambling cards
bathing laundering | washing cleaning
inscribing penmanship | writing notes
mending restoration | repair fixing
brewing distilling | beer drinking
spinning knitting | sewing weaving
stockpiling warehousing | storage keeping
divination prophecy | fortune predictions
tillage hoeing | planting digging
espionage surveillance | lookouts scouting
chanting choirs | singing songs
""")

DAMAGES = _concepts("""
blaze inferno | fire flames
deluge torrent | flood water
tempest gale | storm wind
rime hoarfrost | frost cold
tremor earthquake | quake shaking
corrosion oxidation | pitting wear
mildew mould | fungus rot
locusts termites | pests bugs
cannonballs gunfire | bullets shots
looters vandals | raiders gangs
thunderbolt voltage | lightning electricity
drought dehydration | dryness thirst
landslip avalanche | mudslide snowslide
sunshine glare | sunlight daylight
collision impact | crash accident
neglect abandonment | carelessness disuse
sabotage mischief | tampering pranks
soot fumes | smoke ash
acid vinegar | chemicals bleach
hailstones sleet | hail ballast
""")

OCCASIONS = _concepts("""
wedding nuptials | marriage betrothal
funeral burial | mourning wake
coronation enthronement | crowning accession
carnival masquerade | party festivity
regatta derby | race contest
auction tender | sale bidding
parade procession | march pageant
inquest tribunal | trial hearing
armistice truce | peace ceasefire
mutiny uprising | revolt rebellion
recital symphony | concert music
solstice midsummer | summer june
christening baptism | naming birth
reunion homecoming | gathering return
harvest reaping | autumn october
siege blockade | war invasion
graduation commencement | diploma exam
sermon mass | service church
eclipse comet | astronomy stars
jubilee centenary | anniversary birthday
""")

QUALITIES = _concepts("""
immense colossal | huge giant
minuscule diminutive | tiny small
antique archaic | old aged
novel contemporary | new modern
weighty ponderous | heavy bulky
brittle delicate | fragile breakable
gleaming polished | shiny glossy
grimy soiled | dirty filthy
fractured splintered | broken cracked
hushed muted | quiet silent
strident deafening | loud noisy
scarce uncommon | rare unusual
inexpensive economical | cheap bargain
costly lavish | expensive pricey
graceful exquisite | pretty beautiful
hideous grotesque | ugly unsightly
sturdy robust | strong tough
renowned celebrated | famous known
hollow vacant | empty bare
crooked slanting | bent leaning
""")

ATTRIBUTE_TYPES = (
    AttributeType(
        "colour",
        COLOURS,
        _phrases("lacquered in {} varnish / glazed with {} enamel", "painted {} / tinted {}"),
        "colour",
    ),
    AttributeType(
        "material", MATERIALS, _phrases("carved from {} / fashioned out of {}", "made of {} / built of {}"), "substance"
    ),
    AttributeType(
        "maker",
        MAKERS,
        _phrases("crafted by a {} / assembled by a {}", "created by a {} / designed by a {}"),
        "creator",
    ),
    AttributeType(
        "owner",
        OWNERS,
        _phrases("held by a {} / entrusted to a {}", "owned by a {} / belonging to a {}"),
        "possessor",
    ),
    AttributeType(
        "place",
        PLACES,
        _phrases("displayed at the {} / housed beneath the {}", "located in the {} / found around the {}"),
        "location",
    ),
    AttributeType(
        "emblem",
        EMBLEMS,
        _phrases("engraved with a {} / stamped with a {}", "showing a {} / decorated with a {}"),
        "animal",
    ),
    AttributeType(
        "purpose", PURPOSES, _phrases("reserved for {} / kept for {}", "used for {} / good for {}"), "activity"
    ),
    AttributeType("damage", DAMAGES, _phrases("scarred by {} / weakened by {}", "damaged by {} / hurt by {}"), "harm"),
    AttributeType(
        "occasion",
        OCCASIONS,
        _phrases("unveiled during a {} / commissioned for a {}", "seen at a {} / shown at a {}"),
        "event",
    ),
    AttributeType(
        "quality", QUALITIES, _phrases("described as {} / deemed {}", "rather {} / said to be {}"), "condition"
    ),
)
RELATIONS = (
    _phrases("stands beside / adjoins", "near / next to"),
    _phrases("imitates / was modelled on", "copying / inspired by"),
    _phrases("was swapped against / replaced", "exchanged for / instead of"),
    _phrases("accompanies / travels alongside", "escorting / following"),
)
