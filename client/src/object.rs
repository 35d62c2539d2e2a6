//! JSON as strictly as its schemas: structs that serde derives take lists in the place of objects, `Option` takes null
//! for absent, and a list is as long as somebody likes.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// An object, and nothing else.
#[derive(Clone, Debug, Default, serde::Serialize)]
#[serde(transparent)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OnlyMaps<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for OnlyMaps<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(OnlyMaps(PhantomData))
    }
}

/// Borrowed where it can be: serde borrows fields of its own only.
#[derive(PartialEq, serde::Deserialize)]
#[serde(transparent)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

/// The fields of an object of which nothing is used.
#[derive(serde::Deserialize)]
pub(crate) struct Anything {}

/// For `#[serde(default, deserialize_with = "present")]`: absent, or a value that is not null.
pub(crate) fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// A list of which at most `N` are kept, and all are counted.
#[derive(Debug, serde::Serialize)]
#[serde(transparent)]
pub(crate) struct Bounded<T, const N: usize> {
    pub(crate) kept: Vec<T>,
    #[serde(skip)]
    pub(crate) count: usize,
}

impl<T, const N: usize> Default for Bounded<T, N> {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl<T, const N: usize> From<Vec<T>> for Bounded<T, N> {
    fn from(kept: Vec<T>) -> Self {
        let count = kept.len();
        Self { kept, count }
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Bounded<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Kept<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Kept<T, N> {
            type Value = Bounded<T, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut kept = Vec::new();
                while kept.len() < N {
                    match list.next_element()? {
                        Some(element) => kept.push(element),
                        None => return Ok(Bounded::from(kept)),
                    }
                }
                let mut count = N;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Bounded { kept, count })
            }
        }
        deserializer.deserialize_seq(Kept(PhantomData))
    }
}
