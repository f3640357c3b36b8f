//! Which part of the data a folder or a shard is, by its name.
//!
//! People call the parts `train` and `val`, `Train` and `Test`, `training` and `validation`, `train_set`, `seg_train`,
//! `train2017`. A name that says nothing else is a part for certain; one with other words in it (`fruits_train`) is
//! one where another name differs in the part alone (`fruits_test`).

use std::ffi::OsStr;
use std::path::Path;

use crate::names;

/// A part of the data. Where there are both, the images held out are those of [`Role::Val`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// To train on.
    Train,
    /// Held out, to choose by.
    Val,
    /// Held out, to measure by.
    Test,
}

/// Words for each part. Some are the words of other things as well (`valid` beside `invalid`): those count where the
/// other part is there.
const WORDS: [(Role, &[&str], &[&str]); 3] = [
    (Role::Train, &["train", "training", "trainval"], &["trn", "trains"]),
    (
        Role::Val,
        &["val", "validation", "holdout", "heldout"],
        &["valid", "validate", "vld", "dev", "eval", "evaluation"],
    ),
    (Role::Test, &["test", "testing"], &["tst", "tests"]),
];

/// Words that say nothing of what is in a folder.
const FILLERS: [&str; 36] = [
    "set", "sets", "data", "dataset", "datasets", "subset", "split", "splits", "part", "folder", "dir", "image",
    "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos", "file", "files", "sample",
    "samples", "seg", "ilsvrc", "imagenet", "coco", "cls", "clsloc", "jpg", "jpeg", "png", "the", "v",
];

/// Endings that are written without a gap: `trainset`, `testdata`.
const ENDINGS: [&str; 7] = ["sets", "set", "data", "images", "imgs", "split", "files"];

/// How sure a word is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Certainty {
    /// Alone it may be something else.
    Weak,
    /// It means the part.
    Strong,
}

/// What a name says of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) role: Role,
    pub(crate) certainty: Certainty,
    /// The words that are neither the part's nor fillers: none where the name is a part for certain.
    pub(crate) rest: Vec<String>,
}

/// The part that a name speaks of; `None` for none, or for several.
pub(crate) fn named(name: &str) -> Option<Named> {
    let words = words(name);
    if let Some((role, certainty)) = of_word(&words.concat()) {
        return Some(Named { role, certainty, rest: Vec::new() });
    }
    let mut found: Option<(Role, Certainty)> = None;
    let mut rest = Vec::new();
    for word in words {
        match (of_word(&word), found) {
            (Some(this), None) => found = Some(this),
            (Some((role, certainty)), Some(before)) => found = Some((both(before.0, role)?, certainty.max(before.1))),
            (None, _) if FILLERS.contains(&word.as_str()) => {}
            (None, _) => rest.push(word),
        }
    }
    found.map(|(role, certainty)| Named { role, certainty, rest })
}

/// Whether a name speaks of both what is trained on and what is held out.
pub(crate) fn is_contradiction(name: &str) -> bool {
    let roles: Vec<Role> = words(name).iter().filter_map(|word| of_word(word)).map(|(role, _)| role).collect();
    roles.contains(&Role::Train) && roles.contains(&Role::Test)
}

/// The part of a name with two: `train_val` is trained on, `val_test` is held out.
fn both(one: Role, other: Role) -> Option<Role> {
    match (one.min(other), one.max(other)) {
        (Role::Train, Role::Test) => None,
        (Role::Val, Role::Test) => Some(Role::Test),
        (role, _) => Some(role),
    }
}

/// The part that a word stands for.
fn of_word(word: &str) -> Option<(Role, Certainty)> {
    let bare = ENDINGS.iter().find_map(|ending| word.strip_suffix(ending)).filter(|bare| !bare.is_empty());
    [Some(word), bare].into_iter().flatten().find_map(|word| {
        WORDS.iter().find_map(|(role, strong, weak)| {
            let certainty = match word {
                word if strong.contains(&word) => Certainty::Strong,
                word if weak.contains(&word) => Certainty::Weak,
                _ => return None,
            };
            Some((*role, certainty))
        })
    })
}

/// The words of a name, in lower case: parted by what is no letter, and where a capital follows a small letter. Numbers
/// are left out.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = ' ';
    for char in name.chars() {
        let begins = char.is_uppercase() && before.is_lowercase();
        if begins || !char.is_alphabetic() {
            words.push(String::new());
        }
        if char.is_alphabetic()
            && let Some(word) = words.last_mut()
        {
            word.extend(char.to_lowercase());
        }
        before = char;
    }
    words.retain(|word| !word.is_empty());
    words
}

/// The part that a name is for certain.
pub(crate) fn certain(name: &OsStr) -> Option<(Role, Certainty)> {
    let named = named(&names::text(name.as_encoded_bytes()))?;
    named.rest.is_empty().then_some((named.role, named.certainty))
}

/// Whether data of this name are held out: a folder that is itself called `val`, or `test.tar`.
pub(crate) fn is_held_out(name: Option<&OsStr>) -> bool {
    matches!(name.and_then(certain), Some((Role::Val | Role::Test, Certainty::Strong)))
}

/// What the folders at one level say together.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// None is a part.
    Whole,
    /// Places in the list of folders.
    Parts { train: Option<usize>, held_out: Option<usize> },
}

/// Tells the parts among the folders at one level. `lone_is_class` is asked about a folder whose name is that of a part
/// while there is no other part: whether it looks like the folders beside it, as a class would.
///
/// # Errors
/// The names that look like parts, where it cannot be told which are.
pub(crate) fn choose<E: From<Vec<String>>>(
    folders: &[String],
    lone_is_class: impl FnOnce(usize) -> std::result::Result<bool, E>,
) -> std::result::Result<Choice, E> {
    let found: Vec<(usize, Named)> =
        folders.iter().enumerate().filter_map(|(place, name)| Some((place, named(name)?))).collect();
    let certain: Vec<_> = found.iter().filter(|(_, named)| named.rest.is_empty()).collect();
    let unclear = |places: &mut dyn Iterator<Item = usize>| E::from(places.map(|at| folders[at].clone()).collect());
    // The plain name comes before all others of its kind.
    let one = |role: Role, plain: &str| -> std::result::Result<Option<usize>, E> {
        let all: Vec<usize> = certain.iter().filter(|(_, named)| named.role == role).map(|(at, _)| *at).collect();
        match (all.iter().find(|at| folders[**at] == plain), all.as_slice()) {
            (Some(at), _) | (None, [at]) => Ok(Some(*at)),
            (None, []) => Ok(None),
            (None, several) => Err(unclear(&mut several.iter().copied())),
        }
    };
    let train = one(Role::Train, "train")?;
    let held_out = match one(Role::Val, "val")? {
        Some(val) => Some(val),
        None => one(Role::Test, "test")?,
    };
    match (train, held_out) {
        (Some(_), Some(_)) => return Ok(Choice::Parts { train, held_out }),
        (Some(lone), None) | (None, Some(lone)) => {
            let is_weak = certain.iter().any(|(at, named)| *at == lone && named.certainty == Certainty::Weak);
            let pairs = pairs(&found);
            if pairs.is_empty() && !(is_weak && folders.len() > 1) && !lone_is_class(lone)? {
                return Ok(Choice::Parts { train, held_out });
            }
        }
        (None, None) => {}
    }
    let is_train = |named: &Named| named.role == Role::Train;
    let all_look_so = found.len() == folders.len()
        && found.iter().any(|(_, named)| is_train(named))
        && found.iter().any(|(_, named)| !is_train(named));
    match pairs(&found).as_slice() {
        [(train, held_out)] => Ok(Choice::Parts { train: Some(*train), held_out: Some(*held_out) }),
        [] if !all_look_so => Ok(Choice::Whole),
        _ => Err(unclear(&mut found.iter().map(|(at, _)| *at))),
    }
}

/// Names that differ in the part alone: `fruits_train` and `fruits_val`; of several held out, the validation part.
fn pairs(found: &[(usize, Named)]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    for (train, named) in found.iter().filter(|(_, named)| named.role == Role::Train) {
        let same = found.iter().filter(|(_, other)| other.role != Role::Train && other.rest == named.rest);
        let held_out = same.min_by_key(|(_, other)| other.role);
        pairs.extend(held_out.map(|(held_out, _)| (*train, *held_out)));
    }
    pairs
}

/// The part that a shard belongs to, by its name and the folders it lies in, of which `path` holds those that shards
/// differ in. A name without a word for a part is trained on.
///
/// # Errors
/// What the name and the folders say, where they contradict each other.
pub(crate) fn of_shard(path: &Path) -> std::result::Result<Role, String> {
    let name = path.file_stem().map(|name| names::text(name.as_encoded_bytes())).unwrap_or_default();
    if is_contradiction(&name) {
        return Err(format!("a name with two parts, {name}"));
    }
    let by_name = named(&name).map(|named| named.role);
    let folders = path.parent().into_iter().flat_map(Path::iter);
    let mut by_folder = None;
    for folder in folders {
        let folder = names::text(folder.as_encoded_bytes());
        if let Some(named) = named(&folder) {
            by_folder = Some((named.role, folder));
        }
    }
    match (by_name, by_folder) {
        (Some(name), Some((folder, text))) if (name == Role::Train) != (folder == Role::Train) => {
            Err(format!("{} in the folder {text}", path.file_name().unwrap_or_default().display()))
        }
        (_, Some((role, _))) | (Some(role), None) => Ok(role),
        (None, None) => Ok(Role::Train),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chosen(folders: &[&str]) -> std::result::Result<Choice, Vec<String>> {
        let names: Vec<String> = folders.iter().map(ToString::to_string).collect();
        choose(&names, |_| Ok::<_, Vec<String>>(false))
    }

    /// The names of the training and the held-out part.
    fn parts<'n>(folders: &[&'n str]) -> Option<(Option<&'n str>, Option<&'n str>)> {
        match chosen(folders).unwrap_or_else(|names| panic!("{folders:?}: unclear {names:?}")) {
            Choice::Whole => None,
            Choice::Parts { train, held_out } => Some((train.map(|at| folders[at]), held_out.map(|at| folders[at]))),
        }
    }

    #[test]
    fn parts_are_known_by_many_names() {
        for (train, held_out) in [
            ("train", "val"),
            ("Train", "Test"),
            ("TRAIN", "VAL"),
            ("training", "validation"),
            ("Training", "Testing"),
            ("train", "valid"),
            ("training_set", "test_set"),
            ("train-set", "dev-set"),
            ("trainset", "testset"),
            ("TrainSet", "TestSet"),
            ("train data", "test data"),
            ("traindata", "evaldata"),
            ("train_images", "val_images"),
            ("imagesTrain", "imagesVal"),
            ("train2017", "val2017"),
            ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
            ("seg_train", "seg_test"),
            ("trainval", "test"),
            ("train_val", "test"),
            ("train", "held-out"),
            ("train", "hold_out"),
            ("1_train", "2_validation"),
            ("asl_alphabet_train", "asl_alphabet_test"),
            ("FruitsTraining", "FruitsValidation"),
            ("trn", "tst"),
        ] {
            assert_eq!(parts(&[train, held_out]), Some((Some(train), Some(held_out))), "{train} {held_out}");
            assert_eq!(parts(&["annotations", held_out, train]), Some((Some(train), Some(held_out))));
        }
        for filler in FILLERS {
            let [train, held_out] = ["train", "test"].map(|part| format!("{filler}_{part}"));
            assert_eq!(parts(&[&train]), Some((Some(&*train), None)), "alone, and so for certain");
            assert_eq!(parts(&[&held_out]), Some((None, Some(&*held_out))));
        }
        assert_eq!(parts(&["train", "test", "val"]), Some((Some("train"), Some("val"))));
        assert_eq!(parts(&["Test", "train", "Valid"]), Some((Some("train"), Some("Valid"))));
        assert_eq!(parts(&["Train", "train", "test"]), Some((Some("train"), Some("test"))), "the plain name is meant");
        assert_eq!(parts(&["a_test", "a_train", "a_val"]), Some((Some("a_train"), Some("a_val"))));
        assert_eq!(parts(&["Train"]), Some((Some("Train"), None)));
        assert_eq!(parts(&["cat", "Testing", "dog"]), Some((None, Some("Testing"))));
    }

    #[test]
    fn classes_stay_classes() {
        for folders in [
            ["cat", "dog"],
            ["valid", "invalid"],
            ["dev", "ops"],
            ["bullet train", "steam train"],
            ["test tube", "beaker"],
            ["trainer", "contest"],
            ["interval", "latest"],
            ["fruits_train", "vegetables"],
        ] {
            assert_eq!(parts(&folders), None, "{folders:?}");
        }
        let names = ["bus", "car", "train"].map(String::from);
        assert_eq!(choose(&names, |at| Ok::<_, Vec<String>>(at == 2)), Ok(Choice::Whole), "a vehicle");
    }

    #[test]
    fn what_cannot_be_told_is_refused_by_name() {
        for folders in [
            vec!["train_a", "train_b", "test_a", "test_b"],
            vec!["good_train", "bad_test"],
            vec!["train1", "train2", "val"],
            vec!["Train", "TRAIN", "val"],
            vec!["Val", "VAL", "train"],
        ] {
            let names = chosen(&folders).expect_err("unclear");
            assert!(names.len() > 1 && names.iter().all(|name| folders.contains(&name.as_str())), "{names:?}");
        }
    }

    #[test]
    fn a_name_of_two_parts_is_one_or_neither() {
        let role = |name| named(name).map(|named| named.role);
        assert_eq!(role("train_val"), Some(Role::Train));
        assert_eq!(role("val_test"), Some(Role::Test));
        assert_eq!([role("train_test"), role("test_train")], [None, None]);
        assert!(is_contradiction("train_test") && !is_contradiction("train_val"));
    }

    /// `valid` may be a class beside `invalid`, so data of that name are not held out for it.
    #[test]
    fn weak_words_do_not_hold_data_out() {
        for (name, expected) in [
            ("val", true),
            ("Test.tar", true),
            ("valid", false),
            ("dev", false),
            ("train", false),
            ("test tube", false),
        ] {
            assert_eq!(is_held_out(Path::new(name).file_stem()), expected, "{name}");
        }
        assert!(!is_held_out(None));
    }

    #[test]
    fn shards_go_by_words_and_folders() {
        for (name, expected) in [
            ("train-000000.tar", Role::Train),
            ("imagenet1k-validation-07.tar", Role::Val),
            ("ILSVRC_val_0.tar", Role::Val),
            ("imagenetVal0001.tar", Role::Val),
            ("test0001.tar", Role::Test),
            ("x/test.tar", Role::Test),
            ("val/00000.tar", Role::Val),
            ("TEST/00000.tar", Role::Test),
            ("validation/part/00000.tar", Role::Val),
            ("train/00000.tar", Role::Train),
            ("val/val-0.tar", Role::Val),
            ("interval-0.tar", Role::Train),
            ("000123.tar", Role::Train),
        ] {
            assert_eq!(of_shard(Path::new(name)), Ok(expected), "{name}");
        }
        for name in ["val/train-0.tar", "train/test-0.tar", "train-test-0.tar"] {
            of_shard(Path::new(name)).expect_err(name);
        }
    }

    proptest! {
        #[test]
        fn any_names_give_parts_or_a_refusal(folders in prop::collection::vec("([tT]rain|val|TEST|dev|set|_|1|é| |a){0,4}", 0..5)) {
            match choose(&folders, |_| Ok::<_, Vec<String>>(false)) {
                Ok(Choice::Whole) => {
                    // Never a training and a held-out part side by side as classes.
                    let certain = |role| folders.iter().any(|name| {
                        named(name).is_some_and(|named| named.rest.is_empty() && named.role == role)
                    });
                    prop_assert!(!certain(Role::Train) || !(certain(Role::Val) || certain(Role::Test)), "{folders:?}");
                }
                Ok(Choice::Parts { train, held_out }) => {
                    prop_assert!(train.is_some() || held_out.is_some());
                    prop_assert_ne!(train, held_out);
                }
                Err(names) => prop_assert!(!names.is_empty()),
            }
        }
    }
}
