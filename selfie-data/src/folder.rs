//! Folders of images by the rules of torchvision's `ImageFolder`, and plain tar files of them.
//!
//! Classes are the sorted names of the first-level folders; files count by their extension and are
//! recognised by content. Where no labels are needed, any folder will do, at any depth. The order
//! is that of the path's bytes. A validation folder without class folders is labelled by a file:
//! [`crate::val_labels`]. Hidden files and folders are skipped; symbolic links are followed,
//! but not in circles.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::audit::Misnamed;
use crate::dataset::{Dataset, Geometry, Need, Split};
use crate::error::{Error, Result, reading};
use crate::picture::{Image, check_size};
use crate::tar_index::{Member, read_exact_at};
use crate::val_labels::Flat;

/// Files that count as images.
pub(crate) const EXTENSIONS: [&str; 9] = ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"];

/// Where the bytes of images are.
enum Store {
    Folder,
    /// Images are read at their offsets, by any thread.
    Tar(File),
}

/// One image file.
struct Entry {
    /// Relative to the root.
    path: PathBuf,
    label: Option<u32>,
    /// Place in the tar; a folder's files have none.
    offset: u64,
    bytes: u64,
}

/// Image files below one root.
pub(crate) struct Files {
    root: PathBuf,
    store: Store,
    part: &'static str,
    classes: Vec<String>,
    entries: Vec<Entry>,
}

/// What lies below the chosen part of the data.
#[derive(Default)]
struct Listing {
    /// Names of the first-level folders.
    folders: BTreeSet<String>,
    images: Vec<Entry>,
    /// Numbers of other files, by extension.
    others: BTreeMap<String, usize>,
}

impl Files {
    pub(crate) fn from_folder(root: &Path, split: Split, need: Need) -> Result<Self> {
        let part = choose_part(root, root.file_name(), |name| root.join(name).is_dir(), split)?;
        let mut listing = Listing::default();
        let base = root.join(part);
        let mut above = vec![base.canonicalize().map_err(reading(&base))?];
        walk(root, Path::new(part), &mut above, &mut listing)?;
        listing.folders = folders(&base)?;
        let beside = Beside {
            classes: &|| match root.join("train") {
                train if train.is_dir() => Ok(folders(&train)?.into_iter().collect()),
                _ => Ok(Vec::new()),
            },
            read: &|inside| {
                let path = root.join(inside);
                if path.is_file() { fs::read(&path).map(Some).map_err(reading(&path)) } else { Ok(None) }
            },
        };
        Self::new(root, Store::Folder, part, listing, need, &beside)
    }

    /// From the indexed members of a plain tar.
    pub(crate) fn from_tar(path: &Path, file: File, index: Vec<Member>, split: Split, need: Need) -> Result<Self> {
        let member =
            |Member { path, is_folder, offset, bytes }| (Entry { path, label: None, offset, bytes }, is_folder);
        let members: Vec<_> = index.into_iter().map(member).collect();
        // Archives usually hold one folder; the names inside it are what counts.
        let top = |path: &Path| path.components().next().map(|part| PathBuf::from(part.as_os_str()));
        let tops: BTreeSet<_> = members.iter().filter_map(|(entry, _)| top(&entry.path)).collect();
        let alone = members.iter().all(|(entry, is_folder)| *is_folder || entry.path.components().count() > 1);
        let base = match tops.first() {
            Some(only)
                if tops.len() == 1 && alone && !["train", "val", "test"].iter().any(|part| only == Path::new(part)) =>
            {
                only.clone()
            }
            _ => PathBuf::new(),
        };
        let inside = |name: &str| members.iter().any(|(entry, _)| entry.path.starts_with(base.join(name)));
        let part = choose_part(path, path.file_stem(), inside, split)?;
        let texts: BTreeMap<PathBuf, (u64, u64)> = members
            .iter()
            .filter(|(entry, is_folder)| !is_folder && has_label_extension(&entry.path))
            .filter_map(|(entry, _)| Some((entry.path.strip_prefix(&base).ok()?.into(), (entry.offset, entry.bytes))))
            .collect();
        let mut train = BTreeSet::new();
        let mut listing = Listing::default();
        for (mut entry, is_folder) in members {
            let Ok(path) = entry.path.strip_prefix(&base) else { continue };
            if let Ok(inner) = path.strip_prefix("train") {
                train.extend(first_folder(inner, is_folder));
            }
            let Ok(inner) = path.strip_prefix(part) else { continue };
            if inner.components().any(|part| is_hidden(part.as_os_str())) {
                continue;
            }
            listing.folders.extend(first_folder(inner, is_folder));
            if !is_folder {
                entry.path = path.to_path_buf();
                listing.add(entry);
            }
        }
        let beside = Beside {
            classes: &|| Ok(train.iter().cloned().collect()),
            read: &|inside| {
                let Some((offset, len)) = texts.get(inside) else { return Ok(None) };
                let mut bytes = vec![0; *len as usize];
                read_exact_at(&file, &mut bytes, *offset).map_err(reading(path))?;
                Ok(Some(bytes))
            },
        };
        let mut files = Self::new(path, Store::Folder, part, listing, need, &beside)?;
        files.store = Store::Tar(file);
        Ok(files)
    }

    fn new(
        root: &Path,
        store: Store,
        part: &'static str,
        listing: Listing,
        need: Need,
        beside: &Beside<'_>,
    ) -> Result<Self> {
        let base = if part.is_empty() { root.to_path_buf() } else { root.join(part) };
        let found = listing.found();
        let Listing { folders, mut images, .. } = listing;
        let classes: Vec<String> = folders.into_iter().collect();
        let mut counts = vec![0usize; classes.len()];
        let mut at_root = 0;
        for entry in &mut images {
            let inner = entry.path.strip_prefix(part).unwrap_or(&entry.path);
            let mut parts = inner.components();
            let first = parts.next().filter(|_| parts.next().is_some());
            match first.map(|first| first.as_os_str().to_string_lossy()) {
                Some(name) => {
                    let class = classes.binary_search_by(|class| class.as_str().cmp(&name)).ok();
                    entry.label = class.map(|class| class as u32);
                    counts[class.expect("every first-level folder is listed")] += 1;
                }
                None => at_root += 1,
            }
        }
        images.sort_by(|a, b| a.path.as_os_str().as_encoded_bytes().cmp(b.path.as_os_str().as_encoded_bytes()));
        let is_flat = need == Need::Labels && !part.is_empty() && at_root == images.len() && at_root > 0;
        let flat = if is_flat { label_flat(root, part, &mut images, beside)? } else { None };
        let classes = match (need, flat) {
            (_, Some(classes)) => classes,
            (Need::Labels, None) => {
                // Images beside the class folders have no class: torchvision leaves them out.
                images.retain(|entry| entry.label.is_some());
                let empty = counts.iter().position(|count| *count == 0);
                if let Some(class) = empty.filter(|_| !images.is_empty()) {
                    return Err(Error::malformed(
                        &base,
                        "images in every class folder",
                        format!("none in {}", classes[class]),
                        "remove the folder, or put images into it",
                    ));
                }
                classes
            }
            (Need::Images, None) if at_root > 0 => {
                images.iter_mut().for_each(|entry| entry.label = None);
                Vec::new()
            }
            (Need::Images, None) => classes,
        };
        if images.is_empty() {
            let expected = match need {
                Need::Labels => "images in class folders (class/name.jpg)",
                Need::Images => "images, at any depth",
            };
            return Err(Error::malformed(
                &base,
                format!("{expected}, with the extensions {}", EXTENSIONS.join(" ")),
                format!("0 images; {found}"),
                if is_flat { Flat::advice() } else { "give the folder that holds the images".into() },
            ));
        }
        if u32::try_from(images.len()).is_err() {
            return Err(Error::malformed(
                &base,
                "fewer than 2^32 images",
                images.len().to_string(),
                "give a part of them",
            ));
        }
        Ok(Self { root: root.into(), store, part, classes, entries: images })
    }

    fn bytes(&self, entry: &Entry) -> io::Result<Vec<u8>> {
        match &self.store {
            Store::Folder => {
                let path = self.root.join(&entry.path);
                let about = fs::metadata(&path)?;
                // A pipe would be waited for, and a device never ends.
                if !about.is_file() {
                    return Err(io::Error::other("not a regular file"));
                }
                check_size(about.len())?;
                fs::read(path)
            }
            Store::Tar(file) => {
                check_size(entry.bytes)?;
                let mut bytes = vec![0; entry.bytes as usize];
                read_exact_at(file, &mut bytes, entry.offset)?;
                Ok(bytes)
            }
        }
    }

    /// The first bytes, enough to tell the format.
    fn start(&self, entry: &Entry) -> io::Result<Vec<u8>> {
        match &self.store {
            Store::Folder => {
                let mut bytes = Vec::new();
                File::open(self.root.join(&entry.path))?.take(Misnamed::START_BYTES).read_to_end(&mut bytes)?;
                Ok(bytes)
            }
            Store::Tar(file) => {
                let mut bytes = vec![0; entry.bytes.min(Misnamed::START_BYTES) as usize];
                read_exact_at(file, &mut bytes, entry.offset)?;
                Ok(bytes)
            }
        }
    }
}

/// The data around the chosen part, in case that labels have to come from there.
struct Beside<'a> {
    /// Sorted names of the class folders of train/.
    classes: &'a dyn Fn() -> Result<Vec<String>>,
    /// The bytes of a file, by its path inside the root, if it is there.
    read: &'a dyn Fn(&Path) -> Result<Option<Vec<u8>>>,
}

/// Labels images that lie in no class folder by a file beside them; their classes, if there is one.
fn label_flat(root: &Path, part: &str, images: &mut [Entry], beside: &Beside<'_>) -> Result<Option<Vec<String>>> {
    let classes = (beside.classes)()?;
    let name = |entry: &Entry| entry.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names: Vec<String> = images.iter().map(name).collect();
    let flat = Flat { root, part, classes: &classes, images: &names, read: beside.read };
    let Some(labels) = flat.labels()? else { return Ok(None) };
    for (entry, label) in images.iter_mut().zip(labels) {
        entry.label = Some(label);
    }
    Ok(Some(classes))
}

/// Whether a file could hold labels.
fn has_label_extension(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "txt" || ending == "csv")
}

/// Name of the first folder on the way to a file, or of a folder itself.
fn first_folder(inner: &Path, is_folder: bool) -> Option<String> {
    let first = inner.components().next().filter(|_| is_folder || inner.components().count() > 1)?;
    Some(first.as_os_str().to_string_lossy().into_owned()).filter(|name| !name.starts_with('.'))
}

/// Names of the folders in a folder, but hidden ones.
fn folders(folder: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(reading(folder))? {
        let entry = entry.map_err(reading(folder))?;
        if !is_hidden(&entry.file_name()) && entry.path().is_dir() {
            names.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

impl Listing {
    fn add(&mut self, entry: Entry) {
        let extension =
            entry.path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default();
        if EXTENSIONS.contains(&extension.as_str()) {
            self.images.push(entry);
        } else {
            *self.others.entry(extension).or_default() += 1;
        }
    }

    /// What was found, for the message that there are no images.
    fn found(&self) -> String {
        let mut parts = Vec::new();
        if !self.images.is_empty() {
            parts.push(format!("{} images outside class folders", self.images.len()));
        }
        let mut others: Vec<_> = self.others.iter().collect();
        others.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        parts.extend(others.iter().take(3).map(|(extension, count)| match extension.as_str() {
            "" => format!("{count} files without extension"),
            extension => format!("{count} .{extension} files"),
        }));
        if !self.folders.is_empty() {
            let names: Vec<_> = self.folders.iter().take(3).map(String::as_str).collect();
            let more = if self.folders.len() > 3 { ", ..." } else { "" };
            parts.push(format!("{} folders ({}{more})", self.folders.len(), names.join(", ")));
        }
        if parts.is_empty() { "nothing else".into() } else { parts.join(", ") }
    }
}

/// The folder of a split inside the data: "" when all of it is meant.
fn choose_part(
    root: &Path,
    own_name: Option<&OsStr>,
    is_folder: impl Fn(&str) -> bool,
    split: Split,
) -> Result<&'static str> {
    const HELD_OUT: [&str; 2] = ["val", "test"];
    let held_out = HELD_OUT.into_iter().find(|name| is_folder(name));
    let no_test = |found: &str| Err(Error::NoTestPart { path: root.into(), found: found.into() });
    match (split, is_folder("train"), held_out) {
        (Split::Train, true, _) => Ok("train"),
        (Split::Train, false, None) => Ok(""),
        (Split::Train, false, Some(name)) => Err(Error::malformed(
            root,
            "train/ beside the held-out images",
            format!("only {name}/"),
            "give a folder with train/ and val/ (or test/) inside",
        )),
        (Split::Test, _, Some(name)) => Ok(name),
        (Split::Test, false, None) if HELD_OUT.iter().any(|name| own_name == Some(OsStr::new(name))) => Ok(""),
        (Split::Test, true, None) => no_test("only train/"),
        (Split::Test, false, None) => no_test("neither"),
    }
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

/// Lists everything below `root`/`inside`. `above` are the folders on the way, to see circles.
fn walk(root: &Path, inside: &Path, above: &mut Vec<PathBuf>, listing: &mut Listing) -> Result<()> {
    let folder = root.join(inside);
    for entry in fs::read_dir(&folder).map_err(reading(&folder))? {
        let entry = entry.map_err(reading(&folder))?;
        let name = entry.file_name();
        if is_hidden(&name) {
            continue;
        }
        let path = inside.join(&name);
        let mut kind = entry.file_type().map_err(reading(entry.path()))?;
        if kind.is_symlink() {
            // A broken link stays what it is and is reported as a bad image when it is read.
            kind = fs::metadata(entry.path()).map_or(kind, |target| target.file_type());
        }
        if kind.is_dir() {
            let real = entry.path().canonicalize().map_err(reading(entry.path()))?;
            if !above.contains(&real) {
                above.push(real);
                walk(root, &path, above, listing)?;
                above.pop();
            }
        } else {
            listing.add(Entry { path, label: None, offset: 0, bytes: 0 });
        }
    }
    Ok(())
}

impl Dataset for Files {
    fn len(&self) -> usize {
        self.entries.len()
    }

    fn describe(&self) -> String {
        let labels = match self.classes.len() {
            0 => "no classes".to_string(),
            count => format!("{count} classes"),
        };
        let from = if self.part.is_empty() { self.root.clone() } else { self.root.join(self.part) };
        format!("image files, {} images, {labels} ({})", self.len(), from.display())
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.entries[index].label
    }

    fn geometry(&self) -> Geometry {
        Geometry::Variable
    }

    fn key(&self, index: usize) -> String {
        let parts: Vec<_> = self.entries[index].path.iter().map(OsStr::to_string_lossy).collect();
        parts.join("/")
    }

    fn read(&self, index: usize) -> Result<Image> {
        let entry = &self.entries[index];
        let bad = |reason: String| Error::BadImage { key: self.key(index), reason };
        let bytes = self.bytes(entry).map_err(|error| bad(error.to_string()))?;
        Image::decode(&bytes).map_err(bad)
    }

    fn misnamed(&self, index: usize) -> Option<Misnamed> {
        let entry = &self.entries[index];
        // A file that cannot be opened has no content; `read` says why.
        Misnamed::of(&entry.path, &self.start(entry).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar_index;
    use tempfile::TempDir;

    /// An image of one pixel.
    fn pixel(red: u8) -> Vec<u8> {
        [b"P6 1 1 255\n".as_slice(), &[red, 0, 0]].concat()
    }

    /// A folder with the given files; a name that ends in a slash is a folder.
    fn tree(names: &[&str]) -> TempDir {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (number, name) in (0..).zip(names) {
            let path = root.path().join(name);
            if name.ends_with('/') {
                fs::create_dir_all(path).expect("made");
            } else {
                fs::create_dir_all(path.parent().expect("inside the root")).expect("made");
                fs::write(path, pixel(number)).expect("written");
            }
        }
        root
    }

    /// The same files as a tar, inside the folder `top` ("" for none).
    fn tar_of(root: &TempDir, top: &str) -> TempDir {
        let out = tempfile::tempdir().expect("a temporary folder");
        let mut builder = tar::Builder::new(File::create(out.path().join("data.tar")).expect("made"));
        builder.append_dir_all(top, root.path()).and_then(|()| builder.finish()).expect("written");
        out
    }

    fn from_tar(path: &Path, split: Split, need: Need) -> Result<Files> {
        let file = File::open(path).map_err(reading(path))?;
        let members = tar_index::index(path, &file)?;
        Files::from_tar(path, file, members, split, need)
    }

    fn keys(data: &Files) -> Vec<String> {
        (0..data.len()).map(|index| data.key(index)).collect()
    }

    fn labels(data: &Files) -> Vec<Option<u32>> {
        (0..data.len()).map(|index| data.label(index)).collect()
    }

    /// Opens the folder and the tar of it, with and without a top folder; all three must agree.
    fn open(names: &[&str], split: Split, need: Need) -> Result<Files> {
        let root = tree(names);
        let folder = Files::from_folder(root.path(), split, need);
        for top in ["", "pictures"] {
            let out = tar_of(&root, top);
            match (&folder, from_tar(&out.path().join("data.tar"), split, need)) {
                (Ok(folder), Ok(tar)) => {
                    assert_eq!(
                        (keys(folder), labels(folder), &folder.classes),
                        (keys(&tar), labels(&tar), &tar.classes)
                    );
                    for index in 0..tar.len() {
                        assert_eq!(folder.read(index).expect("one pixel"), tar.read(index).expect("one pixel"));
                        assert_eq!(folder.misnamed(index), tar.misnamed(index));
                    }
                }
                (Err(_), Err(_)) => {}
                (folder, tar) => panic!("folder {:?}, tar {:?}", folder.as_ref().err(), tar.err()),
            }
        }
        folder.map(|mut data| {
            // The folder goes away with this function; what was read from it is checked above.
            data.root = PathBuf::new();
            data
        })
    }

    fn message(names: &[&str], split: Split, need: Need) -> String {
        let error = open(names, split, need).err().expect("must be refused");
        assert!(matches!(error, Error::Malformed { .. } | Error::NoTestPart { .. }), "{error:?}");
        error.to_string()
    }

    #[test]
    fn class_folders_are_sorted_and_searched_to_any_depth() {
        let names = [
            "dog/b.jpg",
            "dog/a/z.PNG",
            "cat/x.webp",
            "cat/notes.txt",
            "Zebra/1.tiff",
            "dog/.hidden.jpg",
            ".git/a.jpg",
        ];
        let data = open(&names, Split::Train, Need::Labels).expect("a good folder");
        assert_eq!(data.classes(), ["Zebra", "cat", "dog"]);
        assert_eq!(keys(&data), ["Zebra/1.tiff", "cat/x.webp", "dog/a/z.PNG", "dog/b.jpg"]);
        assert_eq!(labels(&data), [Some(0), Some(1), Some(2), Some(2)]);
    }

    #[test]
    fn splits_are_recognised() {
        let names = ["train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg", "test/5.jpg"];
        let train = open(&names, Split::Train, Need::Labels).expect("a good folder");
        assert_eq!(keys(&train), ["train/a/1.jpg", "train/b/2.jpg"]);
        let test = open(&names, Split::Test, Need::Labels).expect("a good folder");
        assert_eq!(
            (keys(&test), labels(&test)),
            (vec!["val/a/3.jpg".into(), "val/b/4.jpg".into()], vec![Some(0), Some(1)])
        );
        let test = open(&["train/a/1.jpg", "test/a/2.jpg"], Split::Test, Need::Labels).expect("a good folder");
        assert_eq!(keys(&test), ["test/a/2.jpg"]);
        assert!(message(&["a/1.jpg"], Split::Test, Need::Labels).contains("expected val/ or test/"));
        assert!(message(&["train/a/1.jpg"], Split::Test, Need::Images).contains("only train/"));
        assert!(message(&["val/a/1.jpg"], Split::Train, Need::Images).contains("only val/"));
    }

    #[test]
    fn a_folder_called_val_is_its_own_test() {
        let root = tree(&["val/a/1.jpg"]);
        let data = Files::from_folder(&root.path().join("val"), Split::Test, Need::Labels).expect("a good folder");
        assert_eq!(keys(&data), ["a/1.jpg"]);
    }

    #[test]
    fn pretraining_takes_any_folder() {
        let data = open(&["3.jpg", "x/y/z/1.jpg", "x/2.jpg"], Split::Train, Need::Images).expect("any folder");
        assert_eq!((data.len(), data.classes().len(), labels(&data)), (3, 0, vec![None; 3]));
        let data = open(&["a/1.jpg", "b/"], Split::Train, Need::Images).expect("any folder");
        assert_eq!((data.classes().len(), labels(&data)), (2, vec![Some(0)]));
    }

    #[test]
    fn labels_need_class_folders() {
        let data = open(&["stray.jpg", "a/1.jpg"], Split::Train, Need::Labels).expect("a good folder");
        assert_eq!(keys(&data), ["a/1.jpg"]);
        let flat = message(&["1.jpg", "2.jpg"], Split::Train, Need::Labels);
        assert!(flat.contains("0 images") && flat.contains("2 images outside class folders"), "{flat}");
        let empty = message(&["a/1.jpg", "b/"], Split::Train, Need::Labels);
        assert!(empty.contains("none in b"), "{empty}");
    }

    #[test]
    fn no_images_says_what_is_there() {
        let none = message(&["a/1.txt", "a/2.txt", "b/3.csv", "README"], Split::Train, Need::Images);
        for part in [
            "0 images",
            "jpg jpeg png",
            "2 .txt files",
            "1 .csv files",
            "1 files without extension",
            "2 folders (a, b)",
        ] {
            assert!(none.contains(part), "{part}: {none}");
        }
        let empty = tempfile::tempdir().expect("a temporary folder");
        let error = Files::from_folder(empty.path(), Split::Train, Need::Images).err().expect("empty");
        assert!(error.to_string().contains("nothing else"), "{error}");
    }

    #[test]
    fn the_content_decides_and_a_bad_file_is_named() {
        // All files hold PPM data, whatever they are called; one is made bad.
        let root = tree(&["a/1.jpg", "a/2.jpg"]);
        fs::write(root.path().join("a/2.jpg"), b"not an image").expect("written");
        let data = Files::from_folder(root.path(), Split::Train, Need::Labels).expect("a good folder");
        assert_eq!(data.read(0).expect("one pixel"), Image { height: 1, width: 1, pixels: vec![0, 0, 0] });
        let error = data.read(1).expect_err("not an image");
        assert!(matches!(&error, Error::BadImage { key, .. } if key == "a/2.jpg"), "{error:?}");
        let pnm = Misnamed { extension: "jpg".into(), content: "image/x-portable-anymap" };
        assert_eq!((data.misnamed(0), data.misnamed(1)), (Some(pnm), None));
        fs::remove_file(root.path().join("a/1.jpg")).expect("removed");
        assert!(matches!(data.read(0), Err(Error::BadImage { .. })));
        assert_eq!(data.misnamed(0), None);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_but_not_in_circles() {
        use std::os::unix::fs::symlink;
        let root = tree(&["a/1.jpg", "b/c/2.jpg"]);
        symlink(root.path(), root.path().join("b/c/up")).expect("linked");
        symlink(root.path().join("b/c"), root.path().join("b/c/here")).expect("linked");
        symlink(root.path().join("b"), root.path().join("d")).expect("linked");
        symlink(root.path().join("gone"), root.path().join("a/broken.jpg")).expect("linked");
        let data = Files::from_folder(root.path(), Split::Train, Need::Labels).expect("a good folder");
        assert_eq!(keys(&data), ["a/1.jpg", "a/broken.jpg", "b/c/2.jpg", "d/c/2.jpg"]);
        assert!(data.read(1).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_or_too_large_is_a_bad_image() {
        let root = tree(&["a/1.jpg"]);
        std::os::unix::fs::symlink("/dev/zero", root.path().join("a/2.jpg")).expect("linked");
        let sparse = File::create(root.path().join("a/3.jpg")).expect("made");
        sparse.set_len((512 << 20) + 1).expect("a hole");
        let data = Files::from_folder(root.path(), Split::Train, Need::Labels).expect("a good folder");
        for (index, reason) in [(1, "not a regular file"), (2, "536870913 bytes, more than the 512 MiB")] {
            let message = data.read(index).expect_err("no image").to_string();
            assert!(message.contains(reason), "{message}");
        }
    }

    /// A tar of one member, whose header says what `change` makes it say.
    fn forged(data: &[u8], change: impl Fn(&mut tar::Header)) -> Result<Files> {
        let mut header = tar::Header::new_gnu();
        header.set_path("a/1.jpg").expect("a short name");
        header.set_size(data.len() as u64);
        change(&mut header);
        header.set_cksum();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("data.tar");
        fs::write(&path, [header.as_bytes(), data, &[0; 2048][data.len() % 512..]].concat()).expect("written");
        from_tar(&path, Split::Train, Need::Images)
    }

    #[test]
    fn headers_that_lie_are_refused() {
        use tar::EntryType;
        assert_eq!(keys(&forged(&pixel(1), |_| ()).expect("sound")), ["1.jpg"]);
        for bytes in [4096, 1 << 31, 1 << 60, u64::MAX - 512, u64::MAX] {
            for kind in [EntryType::Regular, EntryType::GNULongName, EntryType::XHeader, EntryType::GNUSparse] {
                let lie = |header: &mut tar::Header| {
                    header.set_entry_type(kind);
                    header.set_size(bytes);
                };
                let error = forged(&pixel(1), lie).err().unwrap_or_else(|| panic!("{kind:?} of {bytes} bytes"));
                assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
            }
        }
        // All there, but nothing that a name can be.
        let long = vec![b'a'; 3 << 20];
        let message = forged(&long, |header| header.set_entry_type(EntryType::GNULongName)).err().expect("too long");
        assert!(message.to_string().contains("headers of one member of more than 1048576 bytes"), "{message}");
    }

    #[test]
    fn names_do_not_lead_out_of_a_tar() {
        for name in ["../../etc/passwd.jpg", "/etc/passwd.jpg", "a/../../etc/passwd.jpg"] {
            let raw = |header: &mut tar::Header| {
                header.as_gnu_mut().expect("made so").name[..name.len() + 1]
                    .copy_from_slice(&[name.as_bytes(), &[0]].concat());
            };
            let data = forged(&pixel(1), raw).expect("a name like any other");
            assert!(!data.key(0).contains(".."), "{}", data.key(0));
            assert!(data.read(0).is_ok(), "the bytes are those of the archive");
        }
        for kind in [tar::EntryType::Symlink, tar::EntryType::Link, tar::EntryType::Char] {
            let message = forged(&pixel(1), |header| header.set_entry_type(kind)).err().expect("no image").to_string();
            assert!(message.contains("0 images"), "{message}");
        }
    }

    #[test]
    fn every_truncation_of_a_tar_is_refused() {
        let root = tree(&["a/1.jpg", "a/2.jpg", "b/3.jpg"]);
        let out = tar_of(&root, "pictures");
        let path = out.path().join("data.tar");
        let whole = fs::read(&path).expect("read");
        for cut in (0..=whole.len()).step_by(32) {
            fs::write(&path, &whole[..cut]).expect("written");
            match from_tar(&path, Split::Train, Need::Labels) {
                Err(error) => assert!(matches!(error, Error::Malformed { .. }), "{error:?}"),
                // One of the two blocks of zeros at the end is enough.
                Ok(data) => assert!(cut >= whole.len() - 512 && data.len() == 3, "{cut} of {}", whole.len()),
            }
        }
    }
}
