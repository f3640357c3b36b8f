//! Where the members of a plain tar lie, so that any thread can read any of them.
//!
//! Only headers are read. What is in the archive is what would lie on a disk after tar unpacked it: a name that occurs
//! again is the last one, names begin after the last `..` or the root, and links lead to members. Nothing outside the
//! archive is ever looked at, and nothing is written.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use tar::EntryType;

use crate::bounded::Bounded;
use crate::error::{Error, Result, reading};
use crate::tree::{Extent, Kind, Tree, is_hidden};

/// What a tar may say about one member beside its data: long names and extended headers are kept in memory.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// Names on the way to what a link means, those of other links included: more than the longest path has.
const MAX_STEPS: usize = 4096;

/// Links on the way, as Linux takes them.
const MAX_LINKS: usize = 40;

/// Names on the way to a member: no one nests data deeper, and every folder takes memory.
const MAX_DEPTH: usize = 256;

/// How often links may lead to every member.
const MAX_TIMES: usize = 64;

/// Links whose target is not in the archive.
const NOWHERE: &str = "links that lead nowhere in the archive";

/// A file in a tar.
pub(crate) struct Member {
    pub(crate) path: PathBuf,
    /// Place of its bytes, which lie inside the file.
    pub(crate) extent: Extent,
}

impl Member {
    /// Whether this lies in one of the folders around the data, as [`Index::wrapper`] has them, or in one inside these.
    pub(crate) fn is_shallow(&self, wrapper: &Path) -> bool {
        self.path.ancestors().skip(1).take(2).any(|folder| wrapper.starts_with(folder))
    }

    /// Reads the member from its tar.
    pub(crate) fn reader<'f>(&self, file: &'f File) -> MemberReader<'f> {
        let Extent { offset, bytes } = self.extent;
        MemberReader { file, at: offset, end: offset + bytes }
    }
}

/// The bytes of a member, in order.
pub(crate) struct MemberReader<'f> {
    file: &'f File,
    at: u64,
    end: u64,
}

impl Read for MemberReader<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = (bytes.len() as u64).min(self.end - self.at) as usize;
        read_exact_at(self.file, &mut bytes[..count], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// The members of a tar. They lie flat, as folders can be nested deeper than a call stack is.
pub(crate) struct Index {
    /// In the order in which their names came first; the first is the root.
    nodes: Vec<Node>,
}

struct Node {
    name: Rc<OsStr>,
    parent: usize,
    what: What,
}

enum What {
    Folder(BTreeMap<Rc<OsStr>, usize>),
    File(Extent),
    /// A link, and where it leads from the folder that it lies in.
    Link(PathBuf),
    Lost(&'static str),
}

const ROOT: usize = 0;

/// What is left for a way through links.
struct Budget {
    steps: usize,
    links: usize,
}

impl Index {
    fn new() -> Self {
        let root = Node { name: Rc::from(OsStr::new("")), parent: ROOT, what: What::Folder(BTreeMap::new()) };
        Self { nodes: vec![root] }
    }

    fn child(&self, folder: usize, name: &OsStr) -> Option<usize> {
        match &self.nodes[folder].what {
            What::Folder(children) => children.get(name).copied(),
            What::File(_) | What::Link(_) | What::Lost(_) => None,
        }
    }

    /// Adds a node to a folder that has none of this name.
    fn add(&mut self, folder: usize, name: &OsStr, what: What) -> usize {
        let (name, id): (Rc<OsStr>, _) = (Rc::from(name), self.nodes.len());
        if let What::Folder(children) = &mut self.nodes[folder].what {
            children.insert(name.clone(), id);
        }
        self.nodes.push(Node { name, parent: folder, what });
        id
    }

    /// What tar does when it comes to a member.
    fn unpack(&mut self, path: &[&OsStr], what: What) {
        let Some((last, folders)) = path.split_last() else { return };
        let mut at = ROOT;
        for name in folders {
            at = match self.child(at, name) {
                None => self.add(at, name, What::Folder(BTreeMap::new())),
                Some(id) => match self.follow(id) {
                    Some(folder) if matches!(self.nodes[folder].what, What::Folder(_)) => folder,
                    Some(_) | None => {
                        self.nodes[id].what = What::Folder(BTreeMap::new());
                        id
                    }
                },
            };
        }
        match (self.child(at, last), what) {
            (None, what) => drop(self.add(at, last, what)),
            // A folder is made once, and not removed where there is something in it.
            (Some(id), What::Folder(_)) if self.follow(id).is_some_and(|id| self.is_folder(id)) => {}
            (Some(id), what) => {
                let is_full = matches!(&self.nodes[id].what, What::Folder(children) if !children.is_empty());
                if !is_full {
                    self.nodes[id].what = what;
                }
            }
        }
    }

    fn is_folder(&self, id: usize) -> bool {
        matches!(self.nodes[id].what, What::Folder(_))
    }

    /// What a hard link to `target` is, when tar comes to it: another name of a file or of a link. `None` for what is
    /// not there, which tar does not make.
    fn hard_link(&self, target: &[&OsStr]) -> Option<What> {
        match &self.nodes[self.unfollowed(target)?].what {
            What::File(extent) => Some(What::File(*extent)),
            What::Link(path) => Some(What::Link(path.clone())),
            What::Folder(_) | What::Lost(_) => None,
        }
    }

    /// The node of a name, the last link on the way not followed.
    fn unfollowed(&self, path: &[&OsStr]) -> Option<usize> {
        let (last, folders) = path.split_last()?;
        self.child(self.find(&folders.iter().collect::<PathBuf>())?, last)
    }

    /// The node at a path from the root, links followed.
    fn find(&self, path: &Path) -> Option<usize> {
        self.go(ROOT, path, &mut Budget { steps: MAX_STEPS, links: MAX_LINKS })
    }

    /// What a node is in the end.
    fn follow(&self, id: usize) -> Option<usize> {
        self.end_of(id, &mut Budget { steps: MAX_STEPS, links: MAX_LINKS })
    }

    fn end_of(&self, id: usize, budget: &mut Budget) -> Option<usize> {
        let What::Link(target) = &self.nodes[id].what else { return Some(id) };
        budget.links = budget.links.checked_sub(1)?;
        self.go(self.nodes[id].parent, target, budget)
    }

    fn go(&self, from: usize, path: &Path, budget: &mut Budget) -> Option<usize> {
        let mut at = from;
        for part in path.components() {
            budget.steps = budget.steps.checked_sub(1)?;
            at = match part {
                Component::CurDir => at,
                Component::RootDir | Component::Prefix(_) => ROOT,
                Component::ParentDir if at == ROOT => return None,
                Component::ParentDir => self.nodes[at].parent,
                Component::Normal(name) => self.end_of(self.child(at, name)?, budget)?,
            };
        }
        Some(at)
    }

    fn path(&self, mut id: usize) -> PathBuf {
        let mut names = Vec::new();
        while id != ROOT {
            names.push(&*self.nodes[id].name);
            id = self.nodes[id].parent;
        }
        names.iter().rev().collect()
    }

    /// Whether the names on the way to a node are all visible.
    fn is_visible(&self, mut id: usize) -> bool {
        while id != ROOT {
            if is_hidden(&self.nodes[id].name) {
                return false;
            }
            id = self.nodes[id].parent;
        }
        true
    }

    /// The visible files, in the order of the archive; links to files are files.
    pub(crate) fn files(&self) -> impl Iterator<Item = Member> {
        (0..self.nodes.len()).filter_map(|id| {
            let What::File(extent) = self.nodes[self.follow(id)?].what else { return None };
            self.is_visible(id).then(|| Member { path: self.path(id), extent })
        })
    }

    /// Visible links that are none of [`Index::files`], to folders or to nothing.
    pub(crate) fn other_links(&self) -> usize {
        let is_other = |id: usize| {
            let end = self.follow(id).map(|id| &self.nodes[id].what);
            matches!(self.nodes[id].what, What::Link(_)) && !matches!(end, Some(What::File(_))) && self.is_visible(id)
        };
        (0..self.nodes.len()).filter(|id| is_other(*id)).count()
    }

    /// The innermost folder beside which there are only files, in one beside which there are only files, from the root:
    /// data are often packed so, and not always one level deep.
    pub(crate) fn wrapper(&self) -> PathBuf {
        let mut at = ROOT;
        while let What::Folder(children) = &self.nodes[at].what {
            let mut folders = children.iter().filter(|(name, id)| self.is_folder(**id) && !is_hidden(name));
            match (folders.next(), folders.next()) {
                (Some((_, only)), None) => at = *only,
                _ => break,
            }
        }
        self.path(at)
    }
}

/// A tar as a tree of folders.
pub(crate) struct Archive<'a> {
    pub(crate) path: &'a Path,
    pub(crate) file: &'a File,
    pub(crate) index: &'a Index,
}

impl Tree for Archive<'_> {
    fn children(&self, folder: &Path) -> Result<Vec<(OsString, Kind)>> {
        let index = self.index;
        let Some(What::Folder(children)) = index.find(folder).map(|id| &index.nodes[id].what) else {
            return Ok(Vec::new());
        };
        let kind = |id: usize| match index.follow(id).map(|id| &index.nodes[id].what) {
            Some(What::Folder(_)) => Kind::Folder,
            Some(What::File(extent)) => Kind::File(*extent),
            Some(What::Lost(what)) => Kind::Lost(what),
            Some(What::Link(_)) | None => Kind::Lost(NOWHERE),
        };
        let visible = children.iter().filter(|(name, _)| !is_hidden(name));
        Ok(visible.map(|(name, id)| (name.to_os_string(), kind(*id))).collect())
    }

    fn real(&self, folder: &Path) -> Result<PathBuf> {
        Ok(self.index.find(folder).map(|id| self.index.path(id)).unwrap_or_default())
    }

    fn read(&self, file: &Path) -> Result<Option<Vec<u8>>> {
        let found = self.index.find(file).map(|id| &self.index.nodes[id].what);
        let Some(What::File(extent)) = found else { return Ok(None) };
        let mut bytes = vec![0; extent.bytes as usize];
        read_exact_at(self.file, &mut bytes, extent.offset).map_err(reading(self.path))?;
        Ok(Some(bytes))
    }

    fn most(&self) -> usize {
        MAX_TIMES * self.index.nodes.len()
    }
}

/// The names of a path inside the archive, as tar takes them: from the root, and from after the last `..` on.
fn inside(path: &Path) -> Vec<&OsStr> {
    let mut names = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => names.push(name),
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => names.clear(),
            Component::CurDir => {}
        }
    }
    names
}

/// The files and folders of the tar at `path`.
///
/// # Errors
/// [`Error::Malformed`] for a tar that is damaged or not complete.
pub(crate) fn index(path: &Path, file: &File) -> Result<Index> {
    let file_bytes = file.metadata().map_err(reading(path))?.len();
    let damaged = |found: String| {
        Error::malformed(path, "a complete tar archive", found, "copy or download it again, and compare its size")
    };
    let mut archive = tar::Archive::new(Bounded::new(file, MAX_HEADER_BYTES, "headers of one member"));
    let mut index = Index::new();
    let mut end = 0;
    for entry in archive.entries_with_seek().map_err(|error| damaged(error.to_string()))? {
        let entry =
            entry.map_err(|error| damaged(format!("{file_bytes} bytes that break off or are damaged ({error})")))?;
        let name = entry.path().map_err(|error| damaged(error.to_string()))?;
        let names = inside(&name);
        if names.len() > MAX_DEPTH {
            return Err(damaged(format!("a name with {} folders, more than {MAX_DEPTH}", names.len() - 1)));
        }
        let extent = Extent { offset: entry.raw_file_position(), bytes: entry.size() };
        let target = || entry.link_name().map_err(|error| damaged(error.to_string())).map(Option::unwrap_or_default);
        let what = match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous => {
                let last = extent.offset.checked_add(extent.bytes).filter(|last| *last <= file_bytes);
                let broken = || damaged(format!("{file_bytes} bytes, which end inside {}", name.display()));
                end = end.max(last.ok_or_else(broken)?);
                // The first tars marked folders by a slash alone.
                let is_folder = extent.bytes == 0 && name.as_os_str().as_encoded_bytes().ends_with(b"/");
                if is_folder { What::Folder(BTreeMap::new()) } else { What::File(extent) }
            }
            EntryType::Directory => What::Folder(BTreeMap::new()),
            EntryType::Symlink => What::Link(target()?.into_owned()),
            EntryType::Link => match index.hard_link(&inside(&target()?)) {
                Some(what) => what,
                // What has the name already keeps it.
                None if index.unfollowed(&names).is_some() => continue,
                None => What::Lost(NOWHERE),
            },
            EntryType::GNUSparse => What::Lost("sparse files"),
            EntryType::Char | EntryType::Block | EntryType::Fifo => What::Lost("pipes and devices"),
            _ => continue,
        };
        end = end.max(extent.offset);
        index.unpack(&names, what);
    }
    // The end is a block of zeros; without it, members may be missing.
    if file_bytes < end.next_multiple_of(512) + 512 {
        return Err(damaged(format!("{file_bytes} bytes without the end of an archive")));
    }
    Ok(index)
}

/// Fills `bytes` from `offset` on, without moving the place at which others read.
#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// Fills `bytes` from `offset` on.
#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                bytes = &mut bytes[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_begin_after_the_last_step_up() {
        assert_eq!(inside(Path::new("/a/../b/./c")), ["b", "c"]);
    }

    #[test]
    fn links_out_of_the_archive_lead_nowhere() {
        let mut index = Index::new();
        index.unpack(&[OsStr::new("a")], file());
        index.unpack(&[OsStr::new("inside")], What::Link("./a".into()));
        index.unpack(&[OsStr::new("outside")], What::Link("../a".into()));
        let files: Vec<_> = index.files().map(|member| member.path).collect();
        assert_eq!(files, [Path::new("a"), Path::new("inside")]);
        assert_eq!(index.other_links(), 1);
    }

    fn file() -> What {
        What::File(Extent { offset: 512, bytes: 1 })
    }

    #[test]
    fn a_folder_that_is_full_stays_one() {
        let mut index = Index::new();
        index.unpack(&[OsStr::new("a"), OsStr::new("b")], file());
        index.unpack(&[OsStr::new("a")], file());
        assert_eq!(index.files().map(|member| member.path).collect::<Vec<_>>(), [Path::new("a/b")]);
    }

    #[test]
    fn hidden_folders_do_not_hide_the_wrapper() {
        let mut index = Index::new();
        for names in [["data", "cat", "1"], ["data", "dog", "1"], [".git", "refs", "1"]] {
            index.unpack(&names.map(OsStr::new), file());
        }
        assert_eq!(index.wrapper(), Path::new("data"));
    }

    /// An archive of empty members with these names.
    fn archive(names: &[&str]) -> Result<Index> {
        let mut builder = tar::Builder::new(Vec::new());
        for name in names {
            let mut header = tar::Header::new_old();
            header.set_size(0);
            builder.append_data(&mut header, name, io::empty()).expect("in memory");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.tar");
        std::fs::write(&path, builder.into_inner().expect("in memory")).expect("a file");
        index(&path, &File::open(&path).expect("it is there"))
    }

    #[test]
    fn old_tars_mark_folders_by_a_slash() {
        let index = archive(&["folder/", "empty"]).expect("a sound archive");
        assert_eq!(index.files().map(|member| member.path).collect::<Vec<_>>(), [Path::new("empty")]);
    }

    #[test]
    fn names_are_only_so_deep() {
        let name = |depth: usize| format!("{}file", "a/".repeat(depth));
        assert_eq!(archive(&[&name(MAX_DEPTH - 1)]).expect("deep enough").files().count(), 1);
        let refused = archive(&[&name(MAX_DEPTH)]).map(drop).expect_err("too deep");
        assert!(refused.to_string().contains("256 folders"), "{refused}");
    }

    #[test]
    fn hidden_files_are_no_members() {
        let mut index = Index::new();
        for names in [&["a", "b"][..], &["a", "._b"], &[".hidden", "c"], &[".d"]] {
            let names: Vec<&OsStr> = names.iter().map(OsStr::new).collect();
            index.unpack(&names, file());
        }
        assert_eq!(index.files().map(|member| member.path).collect::<Vec<_>>(), [Path::new("a/b")]);
    }

    /// A link to a link to a file is that file, wherever they lie in the archive.
    #[test]
    fn links_to_links_are_followed() {
        let mut index = Index::new();
        index.unpack(&[OsStr::new("first")], What::Link("second".into()));
        index.unpack(&[OsStr::new("second")], What::Link("folder/file".into()));
        index.unpack(&[OsStr::new("folder"), OsStr::new("file")], What::File(Extent { offset: 512, bytes: 7 }));
        let files: Vec<_> = index.files().map(|member| (member.path, member.extent.bytes)).collect();
        let expected = ["first", "second", "folder/file"].map(|path| (PathBuf::from(path), 7));
        assert_eq!(files.len(), 3);
        assert!(expected.iter().all(|file| files.contains(file)), "{files:?}");
        // A hard link is another name of the link itself.
        assert!(matches!(index.hard_link(&[OsStr::new("first")]), Some(What::Link(to)) if to == Path::new("second")));
        assert!(index.hard_link(&[OsStr::new("folder")]).is_none());
    }
}
