"""Everyday words, first names and made-up words that fill the corpus' questions."""

from __future__ import annotations

from random import Random

_WORDS = """
ant ape badger bat bear beaver bee beetle bird bison buffalo butterfly camel cat cheetah chicken cobra cod
cow crab crane cricket crow deer dog dolphin donkey dove dragon duck eagle eel elephant falcon ferret finch
fish flea fly fox frog gecko giraffe goat goose gorilla hamster hare hawk hedgehog hen heron horse hyena
jackal jaguar kangaroo kitten koala lamb leopard lion lizard lobster lynx magpie mammoth mole monkey moose
mosquito moth mouse mule newt octopus otter owl oyster panda panther parrot peacock pelican penguin pig
pigeon pony puppy rabbit raccoon raven reindeer robin rooster salmon scorpion seal shark sheep shrimp skunk
sloth snail snake sparrow spider squid squirrel starling stork swallow swan tiger toad trout tuna turkey
turtle viper vulture walrus wasp weasel whale wolf wombat worm zebra almond apple apricot avocado bacon
banana barley basil bean beet berry biscuit bread broccoli butter cabbage cake candy carrot cashew celery
cereal cheese cherry chili chocolate cinnamon clove cocoa coconut coffee cookie corn cream cucumber curry
date dill egg fig flour garlic ginger grape gravy ham hazelnut honey jam jelly juice kale ketchup kiwi leek
lemon lentil lettuce lime mango maple melon milk mint muffin mushroom mustard noodle nut oat olive onion
orange oregano pancake papaya pasta peach peanut pear pepper pickle pie pineapple pizza plum popcorn potato
pudding pumpkin quince radish raisin raspberry rice rosemary salad salt sandwich sauce sausage soup spinach
steak stew strawberry sugar syrup tea thyme toast tofu tomato turnip vanilla vinegar waffle walnut water
wheat yogurt attic balcony basement basket bathroom bed bedroom bell bench blanket book bottle bowl box brick
broom brush bucket button cabinet camera candle carpet ceiling chair chimney clock closet computer couch
cradle cup curtain cushion desk dish door drawer dresser fan faucet fence fireplace floor fork frame freezer
furniture garage garden gate glass glove hammer handle hanger hinge iron jar kettle key kitchen knife ladder
lamp lantern lid lock mailbox mattress mirror mop mug nail napkin needle oven pan paper pencil piano pillow
plate pot quilt radio razor roof rope rug ruler scissors screw shelf shovel shower sink soap sofa spoon
stairs stove table tape telephone thread toilet towel toy umbrella vase wall wardrobe window wire wrench
airport alley arena avenue bakery bank barn beach bridge building canal canyon castle cathedral cave church
city cliff coast college corner cottage country court desert district factory farm field forest fort fountain
gallery glacier harbor highway hill hospital hotel house hut island jungle lagoon lake library lighthouse
market meadow mill monastery mountain museum oasis ocean office orchard palace park path pharmacy plaza pond
port prairie prison pyramid restaurant river road ruin school sea square stable stadium station store street
studio swamp temple theater tower town tunnel university valley village volcano warehouse waterfall actor
artist author baker barber builder butcher captain carpenter chef clerk clown coach cook dancer dentist
doctor driver editor engineer farmer firefighter fisherman gardener guard guide hunter janitor jeweler judge
king knight lawyer librarian magician mayor mechanic merchant miner musician nurse painter pilot pirate
plumber poet police potter priest prince princess professor queen sailor scientist singer smith soldier
student surgeon tailor teacher waiter wizard writer autumn breeze cloud comet dawn dew dusk earth eclipse
evening fire flame flood fog frost galaxy hail heat horizon ice lightning meteor mist month moon morning mud
night planet puddle rain rainbow rocket sand season shadow sky smoke snow spring stone storm summer sun
sunrise sunset thunder tide tornado twilight wave weather wind winter branch bush cactus cedar clover daisy
fern flower grass ivy leaf lily moss oak palm petal pine pollen reed root rose seed stem thorn tree tulip
twig vine violet weed willow arm back beard bone brain cheek chest chin ear elbow eye face finger foot
forehead hair hand head heart heel knee leg lip lung mouth muscle neck nose palm rib shoulder skin stomach
thumb toe tongue tooth waist wrist belt blouse boot bracelet cap coat collar crown dress earring hat helmet
hood jacket jeans mask necklace pajamas pocket ring sandal scarf shirt shoe skirt sleeve slipper sock suit
sweater tie uniform vest wallet zipper airplane ambulance anchor balloon bicycle boat bus canoe car cart
engine ferry helicopter motor paddle parachute raft sail scooter ship sled submarine subway tractor train
tram truck van wagon wheel yacht album banjo bugle cello chorus concert drum flute guitar harp melody music
opera orchestra rhythm song trumpet tuba violin whistle angle answer arrow autograph badge battery bubble
calendar card chain chalk circle coin color compass crayon crystal cube diamond dice dictionary diary doll
eraser feather flag folder gift glue gold idea jewel kite knot letter line magnet map marble message money
name notebook number page paint parcel pearl pen picture poem present prize puzzle question riddle robot sail
secret sentence shape silver sketch song stamp statue sticker story string surprise telescope ticket token
treasure triangle trophy vowel whisper word ability action adventure advice beauty bravery breath calm chance
change comfort courage culture danger dream energy error event failure fear freedom friend future glory habit
happiness harmony health history honesty hope humor hunger joy justice kindness knowledge language laughter
lesson liberty logic luck magic memory mercy mystery nature order patience peace pleasure power pride promise
reason respect science silence skill sorrow speed spirit strength success talent thought time trouble trust
truth value victory wisdom wonder work amber beige black blue bronze brown copper crimson cyan gray green
indigo lavender magenta maroon navy pink purple red scarlet tan teal turquoise white yellow able angry bitter
bold brave bright broken busy careful cheap clean clever cold cool crazy curious damp dark dear deep dirty
dry dull eager early easy empty famous fancy fast fierce flat foolish free fresh friendly full funny gentle
giant glad golden good grand great handsome happy hard healthy heavy high hollow honest hot huge humble
hungry jolly kind large lazy light little lively lonely long loud lovely lucky mighty modern narrow neat new
nice noisy odd old perfect plain polite poor popular pretty proud quick quiet rapid rare ready rich ripe
rough round sad safe salty scary serious shallow sharp shiny short shy silent silly simple sleepy slim slow
small smart smooth soft solid sour spicy steep sticky stormy strange strong sweet swift tall tame tasty thick
thin tidy tiny tired tough ugly useful warm weak wet wide wild wise wooden young accept add agree allow
arrive ask bake balance become begin believe belong bend blow boil borrow bounce break bring build burn buy
call carry catch chase cheer choose clap climb close collect come complain cover cry cut dance decide deliver
describe destroy dig discover divide draw drink drive drop eat enjoy enter escape explain explore fall feed
feel fight fill find finish float follow forget forgive gather give grow guess happen help hide hold hop hug
hunt imagine improve invite join juggle jump keep kick knock know laugh lead learn leave lend lift listen
live look lose love make march measure meet melt mix move multiply need notice offer open pack park pay pick
plan plant play point pour practice praise pray prepare pretend protect pull push read receive remember
repair repeat rescue rest return ride rise roll run save say search see sell send sew share shine shout show
sing sit sleep slide smell smile sneeze solve speak spell spend spin splash stand start stay steal stop study
subtract swim swing talk taste teach tell think throw tickle touch travel try turn understand visit wait wake
walk wander want wash watch wave wear whistle win wish wonder worry wrap write yawn yell
"""


def words_of(text: str) -> tuple[str, ...]:
    """The words of `text`, which is set as prose to be read easily."""
    return tuple(text.split())


WORDS: tuple[str, ...] = tuple(sorted(set(words_of(_WORDS))))

NAMES: tuple[str, ...] = words_of(
    """
    Ada Adam Aisha Alan Alice Amina Amir Ana Andre Anna Anton Arjun Asha Ben Bella Bruno Carla Carlos Chen
    Chloe Clara Dan Daniel Dara David Diego Dina Elena Eli Ella Emil Emma Erik Eva Farah Felix Fiona Frida
    Gabriel Grace Hana Hans Hassan Helen Hugo Ida Igor Ines Iris Ivan Jack Jana Jasmine Jin Joan Jonas Jose
    Julia Kai Karim Kate Kenji Kira Lara Lars Laila Leo Lena Liam Lina Lucas Lucy Luis Maja Malik Marco Maria
    Marta Max Maya Mei Mia Mila Milo Mina Mohamed Nadia Naomi Nina Noah Nora Olga Oliver Omar Oscar Paul
    Pedro Petra Priya Rafael Rahul Raj Rosa Ruth Sam Sami Sara Sasha Selma Simon Sofia Stefan Tara Theo Tim
    Tom Uma Vera Victor Wei Yara Yuki Yusuf Zara Zoe
    """
)

_ONSETS = words_of(
    "b br c ch cl d dr f fl g gl gr h j k kr l m n p pl pr qu r s sh sk sl sp st t th tr v w z"
)
_VOWELS = words_of("a e i o u ai ea ee oa oo ou")
_ENDINGS = words_of("b ck d g k l ll m n nd ng nt p r rd rn s sh ss st t x y")


def made_up_word(rng: Random) -> str:
    """A pronounceable word of 3 to about 10 letters that no dictionary has to know."""
    syllables = rng.choice((1, 2, 2, 3))
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return word + rng.choice(_ENDINGS) if rng.random() < 0.7 or len(word) < 3 else word


def any_word(rng: Random) -> str:
    """A word to spell: from the list, joined from two of it, made up, or letters at random (2 to 14)."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(WORDS)
    if kind < 0.65:
        joined = rng.choice(WORDS) + rng.choice(WORDS)
        return joined if len(joined) <= 14 else rng.choice(WORDS)
    if kind < 0.9:
        return made_up_word(rng)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9)))
