//! Small changes to inputs, as a function of a seed.

use crate::Target;

/// Longest input that mutations make.
const BYTES_MAX: usize = 64 << 10;

/// SplitMix64 (Steele, Lea, Flood 2014): every seed is as good as any other.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A stream of numbers that depends on nothing but the seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `count`, which must not be 0.
    pub fn below(&mut self, count: usize) -> usize {
        (self.bits() % count as u64) as usize
    }
}

/// Makes inputs from a corpus.
#[derive(Clone, Debug)]
pub struct Mutator<'a> {
    corpus: &'a [Vec<u8>],
    dictionary: &'static [&'static str],
    random: Random,
}

impl<'a> Mutator<'a> {
    /// For a corpus, which must not be empty.
    pub fn new(target: &Target, corpus: &'a [Vec<u8>], seed: u64) -> Self {
        Self {
            corpus,
            dictionary: target.dictionary,
            random: Random::new(seed),
        }
    }

    /// One to eight changes to some input of the corpus.
    pub fn next_input(&mut self) -> Vec<u8> {
        let mut input = self.corpus[self.random.below(self.corpus.len())].clone();
        for _ in 0..=self.random.below(8) {
            self.change(&mut input);
        }
        input.truncate(BYTES_MAX);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let at = self.random.below(input.len() + 1);
        match self.random.below(10) {
            0 if at < input.len() => input[at] ^= 1 << self.random.below(8),
            1 if at < input.len() => input[at] = self.random.bits() as u8,
            2 => input.insert(at, self.random.bits() as u8),
            3 => {
                let range = self.range(input.len());
                input.drain(range);
            }
            4 => {
                let piece = input[self.range(input.len())].to_vec();
                insert(input, at, &piece);
            }
            5 => {
                let piece = input[self.range(input.len())].to_vec();
                let times = 1 << self.random.below(10);
                let times = times.min(BYTES_MAX / piece.len().max(1));
                insert(input, at, &piece.repeat(times));
            }
            6 => {
                let other = &self.corpus[self.random.below(self.corpus.len())];
                let piece = other[self.range(other.len())].to_vec();
                insert(input, at, &piece);
            }
            7 | 8 if !self.dictionary.is_empty() => {
                let piece = self.dictionary[self.random.below(self.dictionary.len())];
                insert(input, at, piece.as_bytes());
            }
            _ => self.change_number(input, at),
        }
    }

    /// Replaces the first run of digits from `at` on by a number at some border.
    fn change_number(&mut self, input: &mut Vec<u8>, at: usize) {
        const BORDERS: [&str; 12] = [
            "0",
            "1",
            "-1",
            "127",
            "65536",
            "2147483648",
            "4294967295",
            "9007199254740993",
            "9223372036854775807",
            "18446744073709551615",
            "99999999999999999999",
            "1e308",
        ];
        let Some(start) = input[at..].iter().position(u8::is_ascii_digit) else {
            return;
        };
        let start = at + start;
        let length = input[start..]
            .iter()
            .take_while(|b| b.is_ascii_digit())
            .count();
        let number = BORDERS[self.random.below(BORDERS.len())];
        input.splice(start..start + length, number.bytes());
    }

    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let (a, b) = (self.random.below(length + 1), self.random.below(length + 1));
        a.min(b)..a.max(b)
    }
}

fn insert(input: &mut Vec<u8>, at: usize, piece: &[u8]) {
    input.splice(at..at, piece.iter().copied());
}
