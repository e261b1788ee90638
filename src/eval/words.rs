//! Words, numbers and names that no two of a prompt share.

use std::collections::HashSet;

use super::EvalError;
use crate::random::SplitMix64;

/// None ends another, and below none begins another: so no pair of them stands within another pair.
const ADJECTIVES: &str = "amber ancient ashen basic bitter blank blunt brave brisk broad bronze calm candid casual \
    cheap civil clever coarse comic common copper cosmic crimson crooked curly daily damp deep dense dim distant \
    double dry dusty eager early eastern elastic elder empty equal exact faded faint fancy fertile fierce final \
    firm flat floral fluent formal fragile frozen gentle giant glassy global golden grand gray green grim hasty \
    hidden hollow humble ideal idle inner jolly juicy keen kind large lazy lean linear local lonely loud loyal \
    lucid lucky lunar major marble mellow mental mild minor misty modern modest muddy mute narrow neat noble \
    nimble northern novel oaken odd olive opaque orange outer oval pale patient pearl plain polar polite proud \
    public pure purple quick quiet rapid rare regal remote rigid ripe robust rough round royal rural rustic \
    sacred salty scarlet secure sharp short shy silent silver simple sleepy slender smooth snowy social solar \
    solid sour spare steady steep stiff stout subtle sudden sunny super swift tender thick thin tidy timid tiny \
    tough tranquil trim tropical tuneful urban vague vast velvet violet vivid warm wavy western wild windy wise \
    witty wooden woolen young zesty";

const NOUNS: &str = "acorn anchor anvil apple apron arrow atlas badge bakery balcony bamboo banjo barrel basin \
    basket beacon beaver bell bicycle blanket boulder bracket branch brick bridge brook broom bucket button cabin \
    cactus camel canal candle canyon carpet castle cedar cello chapel chimney cinema circle clay cliff clock cloud \
    clover comet compass coral cottage cradle crane crater cricket crown crystal curtain cushion daisy deer desert \
    diamond dolphin donkey dragon drawer drum eagle easel elbow ember engine envelope falcon fabric feather fence \
    ferry fiddle finch flag flute forest fossil fountain fox garden garlic gate geyser glacier glove goblet goose \
    gorge granite guitar hammer harbor harvest hazel helmet heron hill honey horizon hotel iceberg igloo island \
    ivory jacket jaguar jasmine jewel journal jungle kayak kettle kitchen kite ladder lagoon lantern lemon lever \
    library lily linen lizard locket magnet mango maple market meadow melon mirror mitten monkey mosaic mountain \
    muffin museum napkin needle nest notebook oasis ocean orchard otter oyster paddle palace panda parcel parrot \
    pebble pencil penguin pepper piano pigeon pillow pilot pirate planet plaza pocket pond prairie pumpkin puzzle \
    quarry quilt rabbit radio raft railway raven ribbon river robin rocket rooster saddle sail salmon sandal \
    satchel scarf school shell shovel shrine sparrow spider spoon stadium statue stream summit sunset swan \
    tavern teapot temple thicket thimble thunder tiger timber tower tractor train treasure trumpet tulip tunnel \
    turnip turtle valley vessel village violin volcano waffle wagon walnut walrus warehouse waterfall whale wheel \
    willow window wizard yacht zebra zipper";

/// How many different pairs of an adjective and a noun there are.
pub(super) fn pairs() -> usize {
    ADJECTIVES.split_whitespace().count() * NOUNS.split_whitespace().count()
}

/// Different pairs such as `amber-acorn`.
pub(super) fn adjective_nouns(count: usize, random: &mut SplitMix64) -> Result<Vec<String>, EvalError> {
    let (adjectives, nouns): (Vec<&str>, Vec<&str>) =
        (ADJECTIVES.split_whitespace().collect(), NOUNS.split_whitespace().collect());
    if count > pairs() {
        return Err(EvalError::Words { wanted: count, there_are: pairs() });
    }
    let pair = |random: &mut SplitMix64| random.below(adjectives.len() * nouns.len());
    let spelled = |pair: usize| format!("{}-{}", adjectives[pair / nouns.len()], nouns[pair % nouns.len()]);
    Ok(distinct(count, || pair(random)).into_iter().map(spelled).collect())
}

/// Different words of as many letters, lower case.
pub(super) fn letters(count: usize, length: usize, random: &mut SplitMix64) -> Vec<String> {
    let letter = |random: &mut SplitMix64| char::from(b'a' + random.below(26) as u8);
    distinct(count, || (0..length).map(|_| letter(random)).collect())
}

/// Different numbers of seven digits.
pub(super) fn numbers(count: usize, random: &mut SplitMix64) -> Vec<String> {
    distinct(count, || (1_000_000 + random.below(9_000_000)).to_string())
}

/// Different random UUIDs (version 4).
pub(super) fn uuids(count: usize, random: &mut SplitMix64) -> Vec<String> {
    distinct(count, || {
        let (high, low) = (random.next(), random.next());
        let (high, low) = (high & !0xf000 | 0x4000, low & !(0b11 << 62) | 0b10 << 62);
        format!(
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            high >> 32,
            high >> 16 & 0xffff,
            high & 0xffff,
            low >> 48,
            low & 0xffff_ffff_ffff
        )
    })
}

/// `count` different draws, in the order they were drawn.
fn distinct<T: Clone + Eq + std::hash::Hash>(count: usize, mut draw: impl FnMut() -> T) -> Vec<T> {
    let mut seen = HashSet::new();
    let mut drawn = Vec::with_capacity(count);
    while drawn.len() < count {
        let next = draw();
        if seen.insert(next.clone()) {
            drawn.push(next);
        }
    }
    drawn
}

/// Puts a list into random order.
pub(super) fn shuffle<T>(list: &mut [T], random: &mut SplitMix64) {
    for index in 0..list.len() {
        let other = index + random.below(list.len() - index);
        list.swap(index, other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_pair_of_words_stands_within_another() {
        let (adjectives, nouns): (Vec<&str>, Vec<&str>) =
            (ADJECTIVES.split_whitespace().collect(), NOUNS.split_whitespace().collect());
        for (index, adjective) in adjectives.iter().enumerate() {
            let other =
                adjectives.iter().enumerate().find(|(at, other)| *at != index && other.ends_with(adjective));
            assert_eq!(other, None, "ends in {adjective}");
        }
        for (index, noun) in nouns.iter().enumerate() {
            let other = nouns.iter().enumerate().find(|(at, other)| *at != index && other.starts_with(noun));
            assert_eq!(other, None, "begins with {noun}");
        }
        // Keys for a prompt of 128K tokens that is nothing but needles.
        assert!(pairs() > 20_000, "{}", pairs());
    }

    #[test]
    fn uuids_are_of_version_4() {
        for uuid in uuids(200, &mut SplitMix64::new(5)) {
            let parts: Vec<&str> = uuid.split('-').collect();
            assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12], "{uuid}");
            assert!(parts[2].starts_with('4') && "89ab".contains(&parts[3][..1]), "{uuid}");
            assert!(parts.concat().chars().all(|char| char.is_ascii_hexdigit()), "{uuid}");
        }
    }
}
