//! Folders of images by the rules of torchvision's `ImageFolder`, and plain tar files of them.
//!
//! Classes are the sorted names of the first-level folders; files count by their extension and are
//! recognised by content. Where no labels are needed, any folder will do, at any depth. The order
//! is that of the path's bytes. Where the parts of the data lie, [`crate::tree`] tells. A validation
//! folder without class folders is labelled by a file: [`crate::val_labels`]. Hidden files and
//! folders are skipped; symbolic links are followed, but not in circles.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::audit::Misnamed;
use crate::dataset::{Dataset, Geometry, Need, Split};
use crate::error::{Error, Result, reading};
use crate::left_out::LeftOut;
use crate::names;
use crate::parts::{self, Certainty, Role};
use crate::picture::{Image, check_size};
use crate::tar_index::{Archive, Index, read_exact_at};
use crate::tree::{self, Disk, Extent, Kind, Place, Tree};
use crate::val_labels::Flat;

/// Files that count as images.
pub(crate) const EXTENSIONS: [&str; 9] = ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"];

/// Whether a file counts as an image.
pub(crate) fn is_image(path: &Path) -> bool {
    let ending = path.extension().and_then(OsStr::to_str);
    ending.is_some_and(|ending| EXTENSIONS.iter().any(|known| ending.eq_ignore_ascii_case(known)))
}

/// Where the bytes of images are.
enum Store {
    /// In files below a folder.
    Folder(PathBuf),
    /// Images are read at their offsets, by any thread.
    Tar(File),
}

/// One image file.
struct Entry {
    /// Relative to the folder that holds the data.
    path: PathBuf,
    label: Option<u32>,
    extent: Extent,
}

/// Image files below one root.
pub(crate) struct Files {
    root: PathBuf,
    store: Store,
    listing: Listing,
}

/// What lies below the chosen part of the data.
struct Listing {
    place: Place,
    /// Texts of the names of the first-level folders, in the order of their bytes.
    classes: Vec<String>,
    images: Vec<Entry>,
    left_out: LeftOut,
    held_out_inside: Option<HeldOutInside>,
}

/// Images to train on whose folders are called like what is held out.
struct HeldOutInside {
    images: usize,
    /// One of the folders.
    folder: String,
}

impl Files {
    pub(crate) fn from_folder(root: &Path, split: Split, need: Need) -> Result<Self> {
        let own_name = match root.file_name() {
            Some(name) => Some(name.to_os_string()),
            None => root.canonicalize().map_err(reading(root))?.file_name().map(OsStr::to_os_string),
        };
        let listing = Listing::of(root, &Disk(root), own_name.as_deref(), split, need)?;
        let store = Store::Folder(root.join(&listing.place.base));
        Ok(Self { root: root.into(), store, listing })
    }

    /// From the indexed members of a plain tar.
    pub(crate) fn from_tar(path: &Path, file: File, index: &Index, split: Split, need: Need) -> Result<Self> {
        let archive = Archive { path, file: &file, index };
        let listing = Listing::of(path, &archive, path.file_stem(), split, need)?;
        Ok(Self { root: path.into(), store: Store::Tar(file), listing })
    }

    fn bytes(&self, entry: &Entry) -> io::Result<Vec<u8>> {
        match &self.store {
            Store::Folder(folder) => {
                let path = folder.join(&entry.path);
                let about = fs::metadata(&path)?;
                // A pipe would be waited for, and a device never ends.
                if !about.is_file() {
                    return Err(io::Error::other("not a regular file"));
                }
                check_size(about.len())?;
                fs::read(path)
            }
            Store::Tar(file) => {
                check_size(entry.extent.bytes)?;
                let mut bytes = vec![0; entry.extent.bytes as usize];
                read_exact_at(file, &mut bytes, entry.extent.offset)?;
                Ok(bytes)
            }
        }
    }

    /// The first bytes, enough to tell the format.
    fn start(&self, entry: &Entry) -> io::Result<Vec<u8>> {
        match &self.store {
            Store::Folder(folder) => {
                let mut bytes = Vec::new();
                File::open(folder.join(&entry.path))?.take(Misnamed::START_BYTES).read_to_end(&mut bytes)?;
                Ok(bytes)
            }
            Store::Tar(file) => {
                let mut bytes = vec![0; entry.extent.bytes.min(Misnamed::START_BYTES) as usize];
                read_exact_at(file, &mut bytes, entry.extent.offset)?;
                Ok(bytes)
            }
        }
    }
}

impl Listing {
    /// Lists the images of a split of the data at `root`, whose name is `own_name`.
    fn of(root: &Path, tree: &dyn Tree, own_name: Option<&OsStr>, split: Split, need: Need) -> Result<Self> {
        let place = tree::locate(root, tree, own_name, split, need)?;
        let mut left_out = LeftOut::default();
        let mut images = Vec::new();
        tree::walk(root, tree, &place.base.join(&place.part), |path, kind| match kind {
            Kind::File(extent) if is_image(&path) => {
                let path = path.strip_prefix(&place.base).map(Path::to_path_buf).unwrap_or(path);
                images.push(Entry { path, label: None, extent });
            }
            Kind::Lost(what) => left_out.add(what),
            Kind::File(_) | Kind::Folder => left_out.add_file(&path),
        })?;
        images.sort_by(|a, b| a.path.as_os_str().as_encoded_bytes().cmp(b.path.as_os_str().as_encoded_bytes()));
        let folders = folders(tree, &place.base.join(&place.classes))?;
        let classes = folders.iter().map(|name| names::text(name.as_encoded_bytes())).collect();
        let mut listing = Self { place, classes, images, left_out, held_out_inside: None };
        let outside = listing.label_by_folder(&folders);
        let inside = root.join(&listing.place.base).join(&listing.place.part);
        let is_flat = need != Need::Images && outside > 0 && outside == listing.images.len();
        let is_flat_part = is_flat && !listing.place.part.as_os_str().is_empty();
        let has_labels = is_flat_part && listing.label_by_file(root, tree)?;
        match need {
            Need::Images if outside > 0 => {
                listing.images.iter_mut().for_each(|entry| entry.label = None);
                listing.classes.clear();
            }
            Need::Images => {}
            Need::Labels | Need::Scoring if has_labels => {}
            Need::Labels | Need::Scoring => {
                // Images beside the class folders have no class: torchvision leaves them out.
                listing.images.retain(|entry| entry.label.is_some());
                if need == Need::Labels && !listing.images.is_empty() {
                    listing.check_classes(&inside)?;
                }
                (0..outside).for_each(|_| listing.left_out.add("images outside class folders"));
            }
        }
        if listing.images.is_empty() {
            return Err(listing.no_images(&inside, need, is_flat_part));
        }
        if u32::try_from(listing.images.len()).is_err() {
            let found = listing.images.len().to_string();
            return Err(Error::malformed(inside, "fewer than 2^32 images", found, "give a part of them"));
        }
        if split == Split::Train && listing.place.part.as_os_str().is_empty() {
            listing.held_out_inside = held_out_inside(&listing.images);
        }
        Ok(listing)
    }

    /// Labels images by the first folder on their way; the number of those that have none.
    fn label_by_folder(&mut self, folders: &[OsString]) -> usize {
        let places: HashMap<&OsStr, u32> = folders.iter().map(OsString::as_os_str).zip(0..).collect();
        let mut outside = 0;
        for entry in &mut self.images {
            let inner = entry.path.strip_prefix(&self.place.classes).unwrap_or(&entry.path);
            let mut parts = inner.components();
            let first = parts.next().filter(|_| parts.next().is_some());
            entry.label = first.and_then(|first| places.get(first.as_os_str()).copied());
            outside += usize::from(entry.label.is_none());
        }
        outside
    }

    /// Labels images that lie in no class folder by a file beside them, if there is one.
    fn label_by_file(&mut self, root: &Path, tree: &dyn Tree) -> Result<bool> {
        let base = &self.place.base;
        let classes = match &self.place.train {
            Some(train) => folders(tree, &base.join(train))?,
            None => Vec::new(),
        };
        let classes: Vec<String> = classes.iter().map(|name| names::text(name.as_encoded_bytes())).collect();
        let name = |entry: &Entry| names::text(entry.path.file_name().unwrap_or_default().as_encoded_bytes());
        let images: Vec<String> = self.images.iter().map(name).collect();
        let read = |inside: &Path| tree.read(&base.join(inside));
        let above = root.join(base);
        let flat = Flat { root: &above, part: &self.place.part, classes: &classes, images: &images, read: &read };
        let Some(labels) = flat.labels()? else { return Ok(false) };
        for (entry, label) in self.images.iter_mut().zip(labels) {
            entry.label = Some(label);
        }
        self.classes = classes;
        Ok(true)
    }

    /// Checks that each class can be trained on.
    fn check_classes(&self, inside: &Path) -> Result<()> {
        let mut counts = vec![0usize; self.classes.len()];
        self.images.iter().filter_map(|entry| entry.label).for_each(|label| counts[label as usize] += 1);
        if let Some(class) = counts.iter().position(|count| *count == 0) {
            return Err(Error::malformed(
                inside,
                "images in every class folder",
                format!("none in {}", self.classes[class]),
                "remove the folder, or put images into it",
            ));
        }
        let mut spelled: HashMap<String, &String> = HashMap::new();
        for class in &self.classes {
            if let Some(other) = spelled.insert(names::composed(class), class) {
                return Err(Error::malformed(
                    inside,
                    "class folders with different names",
                    format!(
                        "{} and {}, one name with {}",
                        names::spelled(other),
                        names::spelled(class),
                        names::difference(other, class)
                    ),
                    "put their images into one folder, or rename one of them",
                ));
            }
        }
        Ok(())
    }

    /// The error that there are no images.
    fn no_images(&self, inside: &Path, need: Need, is_flat_part: bool) -> Error {
        let expected = match need {
            Need::Labels | Need::Scoring => "images in class folders (class/name.jpg)",
            Need::Images => "images, at any depth",
        };
        let mut found = Vec::new();
        if !self.left_out.is_empty() {
            found.push(self.left_out.to_string());
        }
        if !self.classes.is_empty() {
            found.push(format!("{} folders ({})", self.classes.len(), tree::some(&self.classes)));
        }
        if self.place.images_beside > 0 {
            found.push(format!("{} images beside them", self.place.images_beside));
        }
        let advice = if is_flat_part {
            Flat::advice()
        } else if self.left_out.has_unread_pictures() {
            "convert them to JPEG or PNG".into()
        } else {
            "give the folder that holds the images".into()
        };
        let found = if found.is_empty() { "nothing else".into() } else { found.join("; ") };
        let expected = format!("{expected}, with the extensions {}", EXTENSIONS.join(" "));
        Error::malformed(inside, expected, format!("0 images; {found}"), advice)
    }

    /// What is not used, or used although it looks held out, for people.
    fn notes(&self) -> String {
        let mut notes = Vec::new();
        if !self.left_out.is_empty() {
            notes.push(self.left_out.to_string());
        }
        let images = match self.place.images_beside {
            0 => None,
            1 => Some("1 image".into()),
            count => Some(format!("{count} images")),
        };
        let folders = self.place.beside.iter().map(|name| format!("{name}/"));
        let beside: Vec<String> = folders.chain(images).collect();
        if !beside.is_empty() {
            notes.push(format!("beside the parts, and not used: {}", tree::some(&beside)));
        }
        if let Some(HeldOutInside { images, folder }) = &self.held_out_inside {
            notes.push(format!("{images} of the images lie in folders that are called as held out, such as {folder}/"));
        }
        notes.iter().map(|note| format!("; {note}")).collect()
    }
}

/// Counts the images below folders that are called like what is held out.
fn held_out_inside(images: &[Entry]) -> Option<HeldOutInside> {
    let mut known: HashMap<&Path, bool> = HashMap::new();
    let mut found: Option<HeldOutInside> = None;
    for entry in images {
        let Some(folder) = entry.path.parent() else { continue };
        let is_held_out = *known.entry(folder).or_insert_with(|| {
            let role = |name| matches!(parts::certain(name), Some((Role::Val | Role::Test, Certainty::Strong)));
            folder.iter().any(role)
        });
        if is_held_out {
            found.get_or_insert_with(|| HeldOutInside { images: 0, folder: names::key(folder) }).images += 1;
        }
    }
    found
}

/// Sorted names of the folders in a folder, but hidden ones.
fn folders(tree: &dyn Tree, folder: &Path) -> Result<Vec<OsString>> {
    let children = tree.children(folder)?;
    let mut names: Vec<_> =
        children.into_iter().filter(|(_, kind)| *kind == Kind::Folder).map(|(name, _)| name).collect();
    names.sort_by(|a, b| a.as_encoded_bytes().cmp(b.as_encoded_bytes()));
    Ok(names)
}

impl Dataset for Files {
    fn len(&self) -> usize {
        self.listing.images.len()
    }

    fn describe(&self) -> String {
        let labels = match self.listing.classes.len() {
            0 => "no classes".to_string(),
            count => format!("{count} classes"),
        };
        let from = self.root.join(&self.listing.place.base).join(&self.listing.place.part);
        format!("image files, {} images, {labels} ({}){}", self.len(), from.display(), self.listing.notes())
    }

    fn classes(&self) -> &[String] {
        &self.listing.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.listing.images[index].label
    }

    fn geometry(&self) -> Geometry {
        Geometry::Variable
    }

    fn key(&self, index: usize) -> String {
        names::key(&self.listing.images[index].path)
    }

    fn read(&self, index: usize) -> Result<Image> {
        let entry = &self.listing.images[index];
        let bad = |reason: String| Error::BadImage { key: self.key(index), reason };
        let bytes = self.bytes(entry).map_err(|error| bad(error.to_string()))?;
        Image::decode(&bytes).map_err(bad)
    }

    fn check_there(&self) -> Result<()> {
        fs::metadata(&self.root).map(|_| ()).map_err(reading(&self.root))
    }

    fn misnamed(&self, index: usize) -> Option<Misnamed> {
        let entry = &self.listing.images[index];
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
        let index = tar_index::index(path, &file)?;
        Files::from_tar(path, file, &index, split, need)
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
                        (keys(folder), labels(folder), folder.classes(), folder.listing.notes()),
                        (keys(&tar), labels(&tar), tar.classes(), tar.listing.notes())
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
    fn parts_are_recognised_by_other_names_and_in_folders_around_them() {
        for (train, test) in [("Train", "Test"), ("training", "validation"), ("train_set", "test_set")] {
            for around in ["", "archive/", "archive/data set/"] {
                let name = |part: &str, image: &str| format!("{around}{part}/{image}");
                let files = [
                    name(train, "cat/1.jpg"),
                    name(train, "dog/2.jpg"),
                    name(test, "cat/3.jpg"),
                    name(test, "dog/4.jpg"),
                    // What lies around the data does not hide them.
                    "LICENSE".into(),
                    "__MACOSX/archive/train/cat/1.jpg".into(),
                    "docs/read me.txt".into(),
                ];
                let files: Vec<&str> = files.iter().map(String::as_str).collect();
                for need in [Need::Images, Need::Labels] {
                    let data = open(&files, Split::Train, need).expect("a training part");
                    assert_eq!(keys(&data), [format!("{train}/cat/1.jpg"), format!("{train}/dog/2.jpg")]);
                    assert_eq!((data.classes().join(" "), labels(&data)), ("cat dog".into(), vec![Some(0), Some(1)]));
                    let data = open(&files, Split::Test, need).expect("a test part");
                    assert_eq!(keys(&data), [format!("{test}/cat/3.jpg"), format!("{test}/dog/4.jpg")]);
                }
            }
        }
        let unclear = message(&["good_train/a/1.jpg", "bad_test/a/2.jpg"], Split::Train, Need::Images);
        assert!(unclear.contains("look like parts of the data: bad_test, good_train"), "{unclear}");
        let only = message(&["Testing/a/1.jpg", "other/a/1.jpg"], Split::Train, Need::Images);
        assert!(only.contains("only Testing/"), "{only}");
    }

    #[test]
    fn a_part_in_a_folder_of_its_name_is_one() {
        let files = ["seg_train/seg_train/sea/1.jpg", "seg_train/seg_train/wood/2.jpg", "seg_test/seg_test/sea/3.jpg"];
        let files = [files.as_slice(), &["seg_test/seg_test/wood/4.jpg", "seg_pred/seg_pred/5.jpg"]].concat();
        let data = open(&files, Split::Train, Need::Labels).expect("the parts of Intel's scenes");
        assert_eq!((data.classes().join(" "), labels(&data)), ("sea wood".into(), vec![Some(0), Some(1)]));
        assert!(data.describe().contains("beside the parts, and not used: seg_pred/"), "{}", data.describe());
        let data = open(&files, Split::Test, Need::Labels).expect("a test part");
        assert_eq!(keys(&data), ["seg_test/seg_test/sea/3.jpg", "seg_test/seg_test/wood/4.jpg"]);
    }

    #[test]
    fn classes_that_are_called_like_parts_stay_classes() {
        let data = open(&["bus/1.jpg", "car/2.jpg", "train/3.jpg"], Split::Train, Need::Labels).expect("vehicles");
        assert_eq!(data.classes(), ["bus", "car", "train"]);
        let data = open(&["valid/1.jpg", "invalid/2.jpg"], Split::Train, Need::Labels).expect("two classes");
        assert_eq!(data.classes(), ["invalid", "valid"]);
        let single = open(&["archive/cat/1.jpg"], Split::Train, Need::Scoring).expect("one class");
        assert_eq!((single.classes(), keys(&single)), (["cat".to_string()].as_slice(), vec!["cat/1.jpg".to_string()]));
    }

    #[test]
    fn what_is_held_out_deeper_is_said() {
        let files = ["cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg", "dog/test/4.jpg"];
        let data = open(&files, Split::Train, Need::Images).expect("any folder");
        let said = "2 of the images lie in folders that are called as held out, such as cat/test/";
        assert!(data.len() == 4 && data.describe().contains(said), "{}", data.describe());
    }

    #[test]
    fn files_left_out_are_counted_by_kind() {
        let files =
            ["train/a/1.jpg", "train/a/2.HEIC", "train/b/3.png", "train/b/4.gif", "train/b/5.heic", "train/6.bmp"];
        let files = [files.as_slice(), &["val/a/1.jpg", "notes/1.txt", "cover.png"]].concat();
        let data = open(&files, Split::Train, Need::Labels).expect("a good folder");
        let said = "; 4 files left out: 2 .heic, 1 .gif, 1 images outside class folders; \
                    beside the parts, and not used: notes/, 1 image";
        assert!(data.describe().ends_with(said), "{}", data.describe());
        let none = message(&["a/1.heic", "b/2.heic"], Split::Train, Need::Labels);
        assert!(none.contains("2 files left out: 2 .heic") && none.contains("convert them"), "{none}");
    }

    #[test]
    fn a_class_to_measure_by_may_be_empty() {
        let data = open(&["a/1.jpg", "b/", "c/notes.txt"], Split::Train, Need::Scoring).expect("a good folder");
        assert_eq!((data.classes().join(" "), data.len()), ("a b c".into(), 1));
    }

    /// Linux alone takes any bytes for a name.
    #[cfg(target_os = "linux")]
    #[test]
    fn names_that_are_no_text_are_kept_apart() {
        use std::os::unix::ffi::OsStrExt;
        let root = tree(&["dog/1.jpg"]);
        for name in [b"H\xf6he".as_slice(), b"H\xe4he", b"H\\xF6he", b"two\nlines"] {
            let folder = root.path().join(OsStr::from_bytes(name));
            fs::create_dir(&folder).expect("made");
            fs::write(folder.join(OsStr::from_bytes(b"\xfc.jpg")), pixel(name.len() as u8)).expect("written");
        }
        let out = tar_of(&root, "pictures");
        let folder = Files::from_folder(root.path(), Split::Train, Need::Labels).expect("five classes");
        let tar = from_tar(&out.path().join("data.tar"), Split::Train, Need::Labels).expect("five classes");
        for data in [folder, tar] {
            assert_eq!(data.classes(), ["H\\x5CxF6he", "H\\xE4he", "H\\xF6he", "dog", "two\\x0Alines"]);
            let first = ["H\\x5CxF6he/\\xFC.jpg", "H\\xE4he/\\xFC.jpg", "H\\xF6he/\\xFC.jpg", "dog/1.jpg"];
            assert_eq!(
                (&keys(&data)[..4], labels(&data)),
                (first.map(String::from).as_slice(), (0..5).map(Some).collect())
            );
            assert_eq!(data.read(0).expect("one pixel").pixels[0], 7);
        }
    }

    #[test]
    fn classes_that_differ_in_accents_alone_are_refused() {
        let files = ["caf\u{e9}/1.jpg", "cafe\u{301}/2.jpg"];
        let twice = message(&files, Split::Train, Need::Labels);
        assert!(twice.contains("cafe\\u{301} and caf\\u{e9}, one name with composed"), "{twice}");
        assert_eq!(open(&files, Split::Train, Need::Images).expect("any folder").classes().len(), 2);
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
        let root = tree(&["1.jpg", "2.jpg"]);
        let flat = Files::from_folder(root.path(), Split::Train, Need::Labels).err().expect("no classes").to_string();
        assert!(
            flat.contains("0 images") && flat.contains("2 files left out: 2 images outside class folders"),
            "{flat}"
        );
        let empty = message(&["a/1.jpg", "b/"], Split::Train, Need::Labels);
        assert!(empty.contains("none in b"), "{empty}");
    }

    #[test]
    fn no_images_says_what_is_there() {
        let none = message(&["a/1.txt", "a/2.txt", "b/3.csv", "README"], Split::Train, Need::Images);
        for part in
            ["0 images", "jpg jpeg png", "4 files left out: 2 .txt, 1 .csv, 1 without extension", "2 folders (a, b)"]
        {
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
