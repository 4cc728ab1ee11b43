//! Topic patterns: which of them a routing key matches. For exchanges of the embedded broker, and for routes of listeners.
//!
//! Words are parted by dots; `*` stands for one word and `#` for any number of them, none included. The patterns of an
//! exchange share a tree of words. A key walks it as a set of places, all advanced by one word at a time, so the cost is
//! words times places and `#.#.#.#` is no trap.

use std::collections::BTreeMap;

/// Where the pattern with no words ends.
const ROOT: usize = 0;

/// Patterns, each with the destinations bound by it. One destination may be bound by a pattern several times over.
#[derive(Debug)]
pub(crate) struct Patterns<D> {
    places: Vec<Place<D>>,
    /// Places that no pattern needs any more, for the next to come.
    vacant: Vec<usize>,
}

/// A place in the tree: some pattern up to one of its words.
#[derive(Debug)]
struct Place<D> {
    words: BTreeMap<Box<[u8]>, usize>,
    star: Option<usize>,
    hash: Option<usize>,
    /// The last word was `#`: any further word may stay here.
    stays: bool,
    /// What is bound by the pattern that ends here, and how many times.
    ends: BTreeMap<D, usize>,
}

impl<D> Place<D> {
    fn new(stays: bool) -> Place<D> {
        Place { words: BTreeMap::new(), star: None, hash: None, stays, ends: BTreeMap::new() }
    }

    #[cfg(feature = "embedded")]
    fn is_bare(&self) -> bool {
        self.words.is_empty() && self.star.is_none() && self.hash.is_none() && self.ends.is_empty()
    }

    fn next(&self, word: &[u8]) -> Option<usize> {
        match word {
            b"*" => self.star,
            b"#" => self.hash,
            word => self.words.get(word).copied(),
        }
    }
}

/// The words of a key or pattern. The empty key has none; `a.` has two, of which the second is empty.
fn words(key: &[u8]) -> impl Iterator<Item = &[u8]> {
    key.split(|&byte| byte == b'.').skip(usize::from(key.is_empty()))
}

impl<D: Ord + Copy> Patterns<D> {
    pub(crate) fn new() -> Patterns<D> {
        Patterns { places: vec![Place::new(false)], vacant: Vec::new() }
    }

    pub(crate) fn insert(&mut self, pattern: &[u8], destination: D) {
        let mut at = ROOT;
        for word in words(pattern) {
            at = match self.places[at].next(word) {
                Some(next) => next,
                None => self.grow(at, word),
            };
        }
        *self.places[at].ends.entry(destination).or_insert(0) += 1;
    }

    fn grow(&mut self, at: usize, word: &[u8]) -> usize {
        let place = Place::new(word == b"#");
        let new = match self.vacant.pop() {
            Some(vacant) => {
                self.places[vacant] = place;
                vacant
            }
            None => {
                self.places.push(place);
                self.places.len() - 1
            }
        };
        match word {
            b"*" => self.places[at].star = Some(new),
            b"#" => self.places[at].hash = Some(new),
            word => {
                self.places[at].words.insert(word.into(), new);
            }
        }
        new
    }

    /// Takes back one `insert` of the same pattern and destination; without one, does nothing.
    #[cfg(feature = "embedded")]
    pub(crate) fn remove(&mut self, pattern: &[u8], destination: D) {
        let mut path = vec![ROOT];
        let mut at = ROOT;
        for word in words(pattern) {
            let Some(next) = self.places[at].next(word) else { return };
            path.push(next);
            at = next;
        }
        take_one(&mut self.places[at].ends, &destination);
        let mut trail: Vec<&[u8]> = words(pattern).collect();
        while let (Some(at), Some(word)) = (path.pop(), trail.pop()) {
            if !self.places[at].is_bare() {
                return;
            }
            let Some(&parent) = path.last() else { return };
            match word {
                b"*" => self.places[parent].star = None,
                b"#" => self.places[parent].hash = None,
                word => {
                    self.places[parent].words.remove(word);
                }
            }
            self.vacant.push(at);
        }
    }

    /// Adds the destinations of every pattern that `key` matches. One may be added more than once.
    pub(crate) fn route(&self, key: &[u8], found: &mut Vec<D>) {
        let mut here = Vec::new();
        self.arrive(ROOT, &mut here);
        for word in words(key) {
            let mut there = Vec::new();
            for &at in &here {
                let place = &self.places[at];
                if place.stays {
                    self.arrive(at, &mut there);
                }
                for next in [place.words.get(word).copied(), place.star].into_iter().flatten() {
                    self.arrive(next, &mut there);
                }
            }
            // Two ways to one place count once, or `#` after `#` would double the places with every word.
            there.sort_unstable();
            there.dedup();
            here = there;
            if here.is_empty() {
                return;
            }
        }
        for at in here {
            found.extend(self.places[at].ends.keys());
        }
    }

    /// Being at a place is being at its `#` too, which may stand for no word.
    fn arrive(&self, mut at: usize, places: &mut Vec<usize>) {
        places.push(at);
        while let Some(hash) = self.places[at].hash {
            places.push(hash);
            at = hash;
        }
    }
}

/// Takes one off a tally, and what comes to nothing out of it.
#[cfg(feature = "embedded")]
pub(crate) fn take_one<D: Ord>(tally: &mut BTreeMap<D, usize>, destination: &D) {
    if let Some(count) = tally.get_mut(destination) {
        *count -= 1;
        if *count == 0 {
            tally.remove(destination);
        }
    }
}

#[cfg(all(test, feature = "embedded"))]
mod tests {
    use super::*;

    /// The definition, word by word.
    fn matches(pattern: &[&[u8]], key: &[&[u8]]) -> bool {
        match (pattern, key) {
            ([], []) => true,
            ([b"#", rest @ ..], key) => (0..=key.len()).any(|skipped| matches(rest, &key[skipped..])),
            ([b"*", rest @ ..], [_, key @ ..]) => matches(rest, key),
            ([word, rest @ ..], [first, key @ ..]) => word == first && matches(rest, key),
            _ => false,
        }
    }

    fn split(key: &str) -> Vec<&[u8]> {
        words(key.as_bytes()).collect()
    }

    fn one(pattern: &str, key: &str) -> bool {
        let mut patterns = Patterns::new();
        patterns.insert(pattern.as_bytes(), 1);
        let mut found = Vec::new();
        patterns.route(key.as_bytes(), &mut found);
        !found.is_empty()
    }

    #[test]
    fn hash_in_every_position() {
        for (pattern, key, wanted) in [
            ("#", "", true),
            ("*", "", false),
            ("", "", true),
            ("", "a", false),
            ("#.a", "a", true),
            ("#.a", "b.b.a", true),
            ("a.#", "a", true),
            ("a.#", "a.b.c", true),
            ("a.#.b", "a.b", true),
            ("a.#.b", "a.x.y.b", true),
            ("a.#.b", "a.x.y", false),
            ("#.#", "", true),
            ("#.*.#", "", false),
            ("#.*.#", "a", true),
            ("*.#", "a", true),
            ("#.*", "a.b", true),
            ("*", ".", false),
            ("*.*", ".", true),
            ("a.*", "a.", true),
            ("a.*.c", "a.b.b.c", false),
        ] {
            assert_eq!(one(pattern, key), wanted, "{pattern:?} {key:?}");
            assert_eq!(matches(&split(pattern), &split(key)), wanted, "reference: {pattern:?} {key:?}");
        }
    }

    #[test]
    fn like_the_definition_for_random_words() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut line = |words: &[&str]| {
            let length = random.usize(0..6);
            (0..length).map(|_| words[random.usize(0..words.len())]).collect::<Vec<_>>().join(".")
        };
        for _ in 0..300 {
            let bound: Vec<String> = (0..20).map(|_| line(&["a", "b", "", "*", "#"])).collect();
            let mut patterns = Patterns::new();
            for (number, pattern) in bound.iter().enumerate() {
                patterns.insert(pattern.as_bytes(), number);
            }
            // Some are taken back, so that pruning is tried too.
            let (gone, kept) = (0..bound.len()).partition::<Vec<_>, _>(|number| number % 3 == 0);
            for number in gone {
                patterns.remove(bound[number].as_bytes(), number);
            }
            for _ in 0..30 {
                let key = line(&["a", "b", "c", ""]);
                let mut found = Vec::new();
                patterns.route(key.as_bytes(), &mut found);
                found.sort_unstable();
                found.dedup();
                let wanted: Vec<usize> =
                    kept.iter().copied().filter(|&n| matches(&split(&bound[n]), &split(&key))).collect();
                assert_eq!(found, wanted, "key {key:?}, patterns {bound:?}");
            }
        }
    }

    #[test]
    fn what_is_bound_twice_is_unbound_twice() {
        let mut patterns = Patterns::new();
        patterns.insert(b"a.#", 1);
        patterns.insert(b"a.#", 1);
        patterns.remove(b"a.#", 1);
        let mut found = Vec::new();
        patterns.route(b"a.b", &mut found);
        assert_eq!(found, [1]);
        patterns.remove(b"a.#", 1);
        assert!(patterns.places[ROOT].is_bare());
    }

    #[test]
    fn many_hashes_are_no_trap() {
        let mut patterns = Patterns::new();
        patterns.insert("#.a.".repeat(40).trim_end_matches('.').as_bytes(), 1);
        let mut found = Vec::new();
        patterns.route("a.".repeat(120).trim_end_matches('.').as_bytes(), &mut found);
        assert_eq!(found, [1]);
    }
}
