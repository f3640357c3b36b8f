//! Folders and files, on disk or in a tar, and where in them the parts of the data lie.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use crate::dataset::{Need, Split};
use crate::error::{Error, Result, reading};
use crate::folder::is_image;
use crate::names;
use crate::parts::{self, Choice, Role};

/// What other systems leave in folders: macOS' and Windows' bins and indices, Synology's and QNAP's thumbnails.
const JUNK: [&str; 8] = [
    "__MACOSX",
    "@eaDir",
    "@Recycle",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "__pycache__",
];

/// Folders around the data that are looked through.
const MAX_WRAPPERS: usize = 16;

/// Up to so many folders side by side it is looked whether all images lie below one of them.
const FEW_FOLDERS: usize = 8;

/// Place of a file in a tar; on disk there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// What lies in a folder under one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Folder,
    File(Extent),
    /// Nothing that can be read, and what it is.
    Lost(&'static str),
}

/// Folders and files below one root. Paths are relative to it.
pub(crate) trait Tree {
    /// What is in a folder, but hidden names.
    fn children(&self, folder: &Path) -> Result<Vec<(OsString, Kind)>>;

    /// The folder without links on the way, to see circles.
    fn real(&self, folder: &Path) -> Result<PathBuf>;

    /// The bytes of a file, if it is there.
    fn read(&self, file: &Path) -> Result<Option<Vec<u8>>>;

    /// Folders and files that a walk may come by: links can lead to the same ones again and again.
    fn most(&self) -> usize;
}

/// Whether a name is hidden, or of no one's making.
pub(crate) fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".") || JUNK.iter().any(|junk| name == *junk)
}

/// A folder on disk.
pub(crate) struct Disk<'p>(pub(crate) &'p Path);

impl Tree for Disk<'_> {
    fn children(&self, folder: &Path) -> Result<Vec<(OsString, Kind)>> {
        let folder = self.0.join(folder);
        let mut children = Vec::new();
        for entry in fs::read_dir(&folder).map_err(reading(&folder))? {
            let entry = entry.map_err(reading(&folder))?;
            let name = entry.file_name();
            if is_hidden(&name) {
                continue;
            }
            let mut kind = entry.file_type().map_err(reading(entry.path()))?;
            if kind.is_symlink() {
                // A broken link stays what it is and is reported as a bad image when it is read.
                kind = fs::metadata(entry.path()).map_or(kind, |target| target.file_type());
            }
            children.push((name, if kind.is_dir() { Kind::Folder } else { Kind::File(Extent::default()) }));
        }
        Ok(children)
    }

    fn real(&self, folder: &Path) -> Result<PathBuf> {
        let folder = self.0.join(folder);
        folder.canonicalize().map_err(reading(folder))
    }

    fn read(&self, file: &Path) -> Result<Option<Vec<u8>>> {
        let path = self.0.join(file);
        if path.is_file() { fs::read(&path).map(Some).map_err(reading(&path)) } else { Ok(None) }
    }

    fn most(&self) -> usize {
        usize::MAX
    }
}

/// Everything below a folder of a tree but the folders goes to `take`, by its path from the root. Links are followed, but
/// not in circles.
///
/// # Errors
/// Those of the tree; [`Error::Malformed`] for links that multiply what there is, of the data at `root`.
pub(crate) fn walk(root: &Path, tree: &dyn Tree, folder: &Path, mut take: impl FnMut(PathBuf, Kind)) -> Result<()> {
    enum Task {
        Enter(PathBuf, PathBuf),
        Leave,
    }
    let mut above: Vec<PathBuf> = Vec::new();
    let mut tasks = vec![Task::Enter(folder.into(), tree.real(folder)?)];
    let mut visits = 0;
    while let Some(task) = tasks.pop() {
        let Task::Enter(folder, real) = task else {
            above.pop();
            continue;
        };
        above.push(real);
        tasks.push(Task::Leave);
        let children = tree.children(&folder)?;
        visits += children.len();
        if visits > tree.most() {
            let expected = format!("links to what is there, at most {} files through them", tree.most());
            return Err(Error::malformed(root, expected, "more", "pack the files themselves: tar -h"));
        }
        for (name, kind) in children {
            let path = folder.join(name);
            if kind != Kind::Folder {
                take(path, kind);
                continue;
            }
            let real = tree.real(&path)?;
            if !above.contains(&real) {
                tasks.push(Task::Enter(path, real));
            }
        }
    }
    Ok(())
}

/// Where the images of a split lie.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The folder that holds the data: there may be others around it.
    pub(crate) base: PathBuf,
    /// The part's folder in there; "" where all of it is meant.
    pub(crate) part: PathBuf,
    /// The folder in there whose folders are the classes: the part's, or one of the same name inside it.
    pub(crate) classes: PathBuf,
    /// The training part's such folder, where there is one.
    pub(crate) train: Option<PathBuf>,
    /// Folders beside the parts that belong to neither.
    pub(crate) beside: Vec<String>,
    /// Images beside the parts.
    pub(crate) images_beside: usize,
}

/// One level of a tree.
struct Level {
    /// Sorted.
    folders: Vec<OsString>,
    /// Files that count as images.
    images: usize,
}

impl Level {
    fn of(tree: &dyn Tree, folder: &Path) -> Result<Self> {
        let mut level = Level { folders: Vec::new(), images: 0 };
        for (name, kind) in tree.children(folder)? {
            match kind {
                Kind::Folder => level.folders.push(name),
                Kind::File(_) => level.images += usize::from(is_image(Path::new(&name))),
                Kind::Lost(_) => {}
            }
        }
        level.folders.sort();
        Ok(level)
    }

    fn names(&self) -> Vec<String> {
        self.folders.iter().map(|name| names::text(name.as_encoded_bytes())).collect()
    }

    /// Whether two of the folders are a training and a held-out part.
    fn has_both_parts(&self) -> bool {
        let choice = parts::choose(&self.names(), |_| Ok::<_, Vec<String>>(true));
        matches!(choice, Ok(Choice::Parts { train: Some(_), held_out: Some(_) }) | Err(_))
    }
}

/// Errors of the choice of parts.
enum Unclear {
    Names(Vec<String>),
    Other(Error),
}

impl From<Vec<String>> for Unclear {
    fn from(names: Vec<String>) -> Self {
        Unclear::Names(names)
    }
}

/// Finds the images of a split of the data at `root`, whose name is `own_name`.
///
/// # Errors
/// Those of the tree; [`Error::NoTestPart`]; [`Error::Malformed`] where there are only held-out images, or folders of
/// which it cannot be told what part they are.
pub(crate) fn locate(
    root: &Path,
    tree: &dyn Tree,
    own_name: Option<&OsStr>,
    split: Split,
    need: Need,
) -> Result<Place> {
    let mut place = Place::default();
    let mut own_name = own_name.map(OsStr::to_os_string);
    for depth in 0..=MAX_WRAPPERS {
        let level = Level::of(tree, &place.base)?;
        if depth < MAX_WRAPPERS
            && let Some(inner) = only_folder(tree, &place.base, &level, need)?
        {
            place.images_beside += level.images;
            place.base.push(&inner);
            own_name = Some(inner);
            continue;
        }
        let alone = |at: usize| looks_like_a_class(tree, &place.base, &level, at).map_err(Unclear::Other);
        let choice = parts::choose(&level.names(), alone).map_err(|unclear| match unclear {
            Unclear::Other(error) => error,
            Unclear::Names(found) => Error::malformed(
                root.join(&place.base),
                "train/ and val/ (or test/), or folders of classes",
                format!("folders that all look like parts of the data: {}", some(&found)),
                "rename those that are meant to train and val (or test), or give one of them",
            ),
        })?;
        let Choice::Parts { train, held_out } = choice else {
            let is_test = parts::is_held_out(own_name.as_deref());
            return match split {
                Split::Test if !is_test => Err(no_test(root, "neither")),
                Split::Train | Split::Test => Ok(place),
            };
        };
        let folder = |at: usize| &level.folders[at];
        let chosen = match (split, train, held_out) {
            (Split::Train, Some(train), _) => folder(train),
            (Split::Test, _, Some(held_out)) => folder(held_out),
            (Split::Test, Some(train), None) => return Err(no_test(root, &format!("only {}/", show(folder(train))))),
            (Split::Train, None, _) | (Split::Test, None, None) => {
                let only = held_out.map_or_else(String::new, |at| show(folder(at)));
                return Err(Error::malformed(
                    root,
                    "train/ beside the held-out images",
                    format!("only {only}/"),
                    "give a folder with train/ and val/ (or test/) inside, or rename the folder if it is no such part",
                ));
            }
        };
        place.images_beside += level.images;
        place.beside = level.names().into_iter().filter(|name| parts::named(name).is_none()).collect();
        place.part = chosen.into();
        place.classes = classes(tree, &place.base, chosen)?;
        place.train = train.map(|at| classes(tree, &place.base, folder(at))).transpose()?;
        return Ok(place);
    }
    Ok(place)
}

fn no_test(root: &Path, found: &str) -> Error {
    Error::NoTestPart { path: root.into(), found: found.into() }
}

fn show(name: &OsStr) -> String {
    names::text(name.as_encoded_bytes())
}

/// A few names of many.
pub(crate) fn some(names: &[String]) -> String {
    let more = if names.len() > 6 { ", .." } else { "" };
    format!("{}{more}", names.iter().take(6).cloned().collect::<Vec<_>>().join(", "))
}

/// The folder to go into, where it is the only one that counts: no part, and no class.
fn only_folder(tree: &dyn Tree, base: &Path, level: &Level, need: Need) -> Result<Option<OsString>> {
    match level.folders.as_slice() {
        [] => Ok(None),
        [only] => {
            // A name such as `test_data` is no part where the parts are inside it.
            if leads_to_parts(tree, base.join(only))? {
                return Ok(Some(only.clone()));
            }
            if parts::certain(only).is_some() || level.images > 0 {
                return Ok(None);
            }
            // A folder of nothing but images is a class, where there are classes.
            let goes_on = need == Need::Images || !Level::of(tree, &base.join(only))?.folders.is_empty();
            Ok(goes_on.then(|| only.clone()))
        }
        few if few.len() <= FEW_FOLDERS && !level.has_both_parts() => {
            // Notes and annotations lie beside the folder of the images.
            let mut holds = None;
            for name in few {
                if !has_images(tree, &base.join(name))? {
                    continue;
                }
                if holds.replace(name).is_some() {
                    return Ok(None);
                }
            }
            let Some(only) = holds else { return Ok(None) };
            Ok(leads_to_parts(tree, base.join(only))?.then(|| only.clone()))
        }
        _ => Ok(None),
    }
}

/// Whether there are parts in a folder, or in the only one in it, and so on.
fn leads_to_parts(tree: &dyn Tree, mut folder: PathBuf) -> Result<bool> {
    for _ in 0..MAX_WRAPPERS {
        let level = Level::of(tree, &folder)?;
        match level.folders.as_slice() {
            _ if level.has_both_parts() => return Ok(true),
            [only] => folder.push(only),
            _ => return Ok(false),
        }
    }
    Ok(false)
}

/// Whether there is an image anywhere below a folder. Stops at the first.
fn has_images(tree: &dyn Tree, folder: &Path) -> Result<bool> {
    let mut above = vec![tree.real(folder)?];
    let mut folders = vec![folder.to_path_buf()];
    let mut visits = 0;
    while let Some(folder) = folders.pop() {
        for (name, kind) in tree.children(&folder)? {
            visits += 1;
            if visits > tree.most() {
                return Ok(true);
            }
            match kind {
                Kind::File(_) if is_image(Path::new(&name)) => return Ok(true),
                Kind::Folder => {
                    let path = folder.join(name);
                    let real = tree.real(&path)?;
                    if !above.contains(&real) {
                        above.push(real);
                        folders.push(path);
                    }
                }
                Kind::File(_) | Kind::Lost(_) => {}
            }
        }
    }
    Ok(false)
}

/// Whether a folder that is called like a part, but without another part beside it, is a class: one that holds images
/// itself, as a folder beside it does.
fn looks_like_a_class(tree: &dyn Tree, base: &Path, level: &Level, at: usize) -> Result<bool> {
    let is_flat = |name: &OsString| -> Result<bool> {
        let inner = Level::of(tree, &base.join(name))?;
        Ok(inner.images > 0 && inner.folders.is_empty())
    };
    // What may be held out is never taken for a class: it would be trained on.
    let is_train = matches!(parts::certain(&level.folders[at]), Some((Role::Train, _)));
    if !is_train || !is_flat(&level.folders[at])? {
        return Ok(false);
    }
    for (other, name) in level.folders.iter().enumerate().take(FEW_FOLDERS) {
        if other != at && is_flat(name)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The folder whose folders are the classes: the part, or the one of the same part inside it (`seg_train/seg_train`).
fn classes(tree: &dyn Tree, base: &Path, part: &OsStr) -> Result<PathBuf> {
    let level = Level::of(tree, &base.join(part))?;
    let role = |name: &OsStr| parts::named(&show(name)).map(|named| (named.role, named.rest));
    Ok(match level.folders.as_slice() {
        [only] if level.images == 0 && role(only).is_some() && role(only) == role(part) => Path::new(part).join(only),
        _ => part.into(),
    })
}
