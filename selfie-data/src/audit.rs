//! What is wrong with a dataset, found before anyone trains on it, in one pass over all images.
//!
//! Every image is decoded once; 32 bytes stay of it, with a hash of its pixels, so that millions fit
//! into memory. Findings are in the order of the dataset, whatever the number of threads.

use std::cmp::Ordering;
use std::path::Path;
use std::sync::atomic::{self, AtomicUsize};
use std::sync::mpsc::{SyncSender, sync_channel};

use image::ImageFormat;
use twox_hash::XxHash3_128;

use crate::dataset::Dataset;
use crate::error::{BadFile, Error, Result};
use crate::loader::panic_message;
use crate::picture::Image;

/// Shorter sides below this are reported unless asked otherwise: the images of CIFAR have it, and a
/// grid of 4 x 4 patches of 8 pixels needs it.
pub const DEFAULT_MIN_SIDE: usize = 32;

/// Images that a thread takes at a time: few, because photographs take long.
const PORTION: usize = 16;

/// How an audit works.
#[derive(Clone, Copy, Debug)]
pub struct AuditConfig {
    /// Threads that read; 0 takes one per core.
    pub threads: usize,
    /// Images with a side below this many pixels are reported.
    pub min_side: usize,
}

/// What an audit found. Images are named by their index in their part.
#[derive(Clone, Debug, PartialEq)]
pub struct Audit {
    /// About the training images.
    pub train: PartAudit,
    /// About the test images, if there are any.
    pub test: Option<PartAudit>,
    /// Pictures that are in both parts, in the order of the training images.
    pub leaks: Vec<Leak>,
}

/// What was found in one part of the data. Lists are sorted by index.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PartAudit {
    /// Images in this part, unreadable ones included.
    pub images: usize,
    /// Images that cannot be read, and why.
    pub unreadable: Vec<BadFile>,
    /// Readable files whose extension stands for another format than their content has.
    pub misnamed: Vec<(usize, Misnamed)>,
    /// Groups of two or more images with the same size and pixels.
    pub duplicates: Vec<Vec<usize>>,
    /// Images whose pixels are all the same.
    pub constant: Vec<usize>,
    /// Images with a side below [`AuditConfig::min_side`].
    pub tiny: Vec<Tiny>,
    /// Images of every class, in label order, unreadable ones included.
    pub class_counts: Vec<usize>,
    /// Images without a class.
    pub unlabelled: usize,
    /// Sizes of the readable images; `None` if there are none.
    pub sizes: Option<Sizes>,
}

/// A picture in both parts: the indices of all images with these pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leak {
    /// In the training part.
    pub train: Vec<usize>,
    /// In the test part.
    pub test: Vec<usize>,
}

/// A file's name and content, which do not agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misnamed {
    /// The extension, as it is written, without the dot.
    pub extension: String,
    /// The media type of the content, such as `image/png`.
    pub content: &'static str,
}

/// A small image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiny {
    /// Its index.
    pub index: usize,
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
}

/// Sizes of images, in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    /// The shorter side.
    pub short_side: Spread<u32>,
    /// The longer side.
    pub long_side: Spread<u32>,
    /// Width over height.
    pub aspect: Spread<f64>,
}

/// Where values lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread<T> {
    /// The smallest.
    pub min: T,
    /// The middle one; of an even number, the lower of the middle two.
    pub median: T,
    /// The largest.
    pub max: T,
}

impl Misnamed {
    /// Bytes from a file's start that tell its format.
    pub(crate) const START_BYTES: u64 = 64;

    /// What is wrong with the name of a file that begins with `start`. A content of no known format
    /// is not misnamed but unreadable.
    pub(crate) fn of(path: &Path, start: &[u8]) -> Option<Self> {
        let content = image::guess_format(start).ok()?;
        let extension = path.extension()?;
        let agrees = ImageFormat::from_extension(extension) == Some(content);
        let extension = extension.to_string_lossy().into_owned();
        (!agrees).then(|| Self { extension, content: content.to_mime_type() })
    }
}

/// Looks at every image of both parts. `progress` is told how many images of how many are done.
///
/// # Errors
/// [`Error::Worker`] when a thread panicked. An image that cannot be read is a finding.
pub fn audit(
    train: &dyn Dataset,
    test: Option<&dyn Dataset>,
    config: AuditConfig,
    progress: impl FnMut(usize, usize),
) -> Result<Audit> {
    let parts: Vec<&dyn Dataset> = std::iter::once(train).chain(test).collect();
    let mut found: Vec<PartAudit> = parts.iter().map(|part| PartAudit::of_labels(*part)).collect();
    let mut prints = Vec::new();
    look_at_all(&parts, config.threads, progress, |Look { part, index, outcome }| match outcome {
        Ok((print, misnamed)) => {
            prints.push(print);
            found[part].misnamed.extend(misnamed.map(|misnamed| (index, misnamed)));
        }
        Err(bad) => found[part].unreadable.push(bad),
    })?;

    prints.sort_unstable_by_key(|print| (print.part, print.index));
    for (part, found) in (0..).zip(&mut found) {
        found.unreadable.sort_unstable_by_key(|bad| bad.index);
        found.misnamed.sort_unstable_by_key(|(index, _)| *index);
        let first = prints.partition_point(|print| print.part < part);
        let end = prints.partition_point(|print| print.part <= part);
        found.describe(&prints[first..end], config.min_side);
    }
    let leaks = group(prints, &mut found);
    let mut found = found.into_iter();
    let train = found.next().expect("there is a training part");
    Ok(Audit { train, test: found.next(), leaks })
}

/// What stays of a readable image.
struct Print {
    hash: u128,
    index: u32,
    height: u32,
    width: u32,
    /// Its place among the parts: 0 is the training part.
    part: u8,
    constant: bool,
}

impl Print {
    fn of(part: usize, index: usize, image: &Image) -> Self {
        // No decoder gives sides or numbers of images that need more bits.
        let (height, width) = (image.height as u32, image.width as u32);
        // The size is the seed: the same bytes in another shape are another picture.
        let hash = XxHash3_128::oneshot_with_seed(u64::from(height) << 32 | u64::from(width), &image.pixels);
        let first = image.pixels.get(..3);
        let constant = image.pixels.chunks_exact(3).all(|pixel| Some(pixel) == first);
        Self { hash, index: index as u32, height, width, part: part as u8, constant }
    }

    fn short_side(&self) -> u32 {
        self.height.min(self.width)
    }
}

/// One image, looked at.
struct Look {
    part: usize,
    index: usize,
    outcome: std::result::Result<(Print, Option<Misnamed>), BadFile>,
}

impl Look {
    fn at(parts: &[&dyn Dataset], number: usize) -> Self {
        let train = parts[0].len();
        let (part, index) = if number < train { (0, number) } else { (1, number - train) };
        let dataset = parts[part];
        let outcome = match dataset.read(index) {
            Ok(image) => Ok((Print::of(part, index, &image), dataset.misnamed(index))),
            Err(error) => Err(BadFile::new(dataset, index, error)),
        };
        Self { part, index, outcome }
    }
}

/// Hands every image of the parts, looked at by threads, to `take`, in any order.
fn look_at_all(
    parts: &[&dyn Dataset],
    threads: usize,
    mut progress: impl FnMut(usize, usize),
    mut take: impl FnMut(Look),
) -> Result<()> {
    let total = parts.iter().map(|part| part.len()).sum();
    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let next = AtomicUsize::new(0);
    let work = |looks: SyncSender<Vec<Look>>| {
        loop {
            let first = next.fetch_add(PORTION, atomic::Ordering::Relaxed).min(total);
            let portion = first..(first + PORTION).min(total);
            if portion.is_empty() || looks.send(portion.map(|number| Look::at(parts, number)).collect()).is_err() {
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        let (send, looks) = sync_channel(threads);
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (work, send) = (&work, send.clone());
                scope.spawn(move || work(send))
            })
            .collect();
        drop(send);
        let mut done = 0;
        for looks in looks {
            done += looks.len();
            looks.into_iter().for_each(&mut take);
            progress(done, total);
        }
        // All are joined before the first panic is reported: an unjoined one would go on here.
        let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        let panicked = ended.into_iter().find_map(std::result::Result::err);
        panicked.map_or(Ok(()), |panic| Err(Error::Worker { message: panic_message(&*panic) }))
    })
}

impl PartAudit {
    /// What is known without reading an image.
    fn of_labels(dataset: &dyn Dataset) -> Self {
        let mut class_counts = vec![0; dataset.classes().len()];
        let mut unlabelled = 0;
        for index in 0..dataset.len() {
            match dataset.label(index) {
                Some(label) => class_counts[label as usize] += 1,
                None => unlabelled += 1,
            }
        }
        Self { images: dataset.len(), class_counts, unlabelled, ..Self::default() }
    }

    /// Adds what the images of this part, in order, say each for itself.
    fn describe(&mut self, prints: &[Print], min_side: usize) {
        for print in prints {
            let index = print.index as usize;
            if print.constant {
                self.constant.push(index);
            }
            if (print.short_side() as usize) < min_side {
                self.tiny.push(Tiny { index, height: print.height, width: print.width });
            }
        }
        self.sizes = Sizes::of(prints);
    }
}

/// Finds equal images: duplicates go to their part, those in both parts come back.
fn group(mut prints: Vec<Print>, found: &mut [PartAudit]) -> Vec<Leak> {
    prints.sort_unstable_by_key(|print| (print.hash, print.part, print.index));
    let mut leaks = Vec::new();
    for same in prints.chunk_by(|a, b| a.hash == b.hash) {
        let mut members = vec![Vec::new(); found.len()];
        same.iter().for_each(|print| members[usize::from(print.part)].push(print.index as usize));
        if let [train, test] = members.as_slice()
            && !train.is_empty()
            && !test.is_empty()
        {
            leaks.push(Leak { train: train.clone(), test: test.clone() });
        }
        for (found, members) in found.iter_mut().zip(members) {
            if members.len() > 1 {
                found.duplicates.push(members);
            }
        }
    }
    found.iter_mut().for_each(|found| found.duplicates.sort_unstable());
    leaks.sort_unstable_by(|a, b| a.train.cmp(&b.train));
    leaks
}

impl Sizes {
    fn of(prints: &[Print]) -> Option<Self> {
        let sides = |side: fn(&Print) -> u32| Spread::of(prints.iter().map(side).collect(), Ord::cmp);
        let aspects = prints.iter().map(|print| f64::from(print.width) / f64::from(print.height));
        Some(Self {
            short_side: sides(Print::short_side)?,
            long_side: sides(|print| print.height.max(print.width))?,
            aspect: Spread::of(aspects.collect(), f64::total_cmp)?,
        })
    }
}

impl<T: Copy> Spread<T> {
    fn of(mut values: Vec<T>, order: fn(&T, &T) -> Ordering) -> Option<Self> {
        values.sort_unstable_by(order);
        let (min, max) = (*values.first()?, *values.last()?);
        Some(Self { min, median: values[(values.len() - 1) / 2], max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Geometry;
    use crate::testing::Plain;

    /// Pictures in memory; where there is none, it cannot be read. Classes go by turns.
    struct Album {
        pictures: Vec<Option<Image>>,
        classes: Vec<String>,
        misnamed: Vec<usize>,
        /// An image that takes long to read, so that others are ready before it.
        slow: Option<usize>,
    }

    impl Album {
        fn new(pictures: Vec<Option<Image>>) -> Self {
            Self { pictures, classes: vec!["cat".into(), "dog".into()], misnamed: Vec::new(), slow: None }
        }

        /// Pictures that are all different and as they should be.
        fn good(count: u8) -> Self {
            Self::new((0..count).map(|number| picture(number, 32, 40)).collect())
        }
    }

    impl Dataset for Album {
        fn len(&self) -> usize {
            self.pictures.len()
        }

        fn describe(&self) -> String {
            "an album".into()
        }

        fn classes(&self) -> &[String] {
            &self.classes
        }

        fn label(&self, index: usize) -> Option<u32> {
            Some(index as u32 % 2)
        }

        fn geometry(&self) -> Geometry {
            Geometry::Variable
        }

        fn key(&self, index: usize) -> String {
            format!("{index}.png")
        }

        fn read(&self, index: usize) -> Result<Image> {
            if self.slow == Some(index) {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            let torn = || Error::BadImage { key: self.key(index), reason: "torn".into() };
            self.pictures[index].clone().ok_or_else(torn)
        }

        fn misnamed(&self, index: usize) -> Option<Misnamed> {
            let misnamed = || Misnamed { extension: "png".into(), content: "image/bmp" };
            self.misnamed.contains(&index).then(misnamed)
        }
    }

    /// A picture that differs from those of other numbers in its first pixel alone.
    fn picture(number: u8, height: usize, width: usize) -> Option<Image> {
        let mut pixels: Vec<u8> = (0..height * width * 3).map(|at| (at % 251) as u8).collect();
        pixels[0] = number;
        Some(Image { height, width, pixels })
    }

    fn grey(height: usize, width: usize) -> Option<Image> {
        Some(Image { height, width, pixels: vec![128; height * width * 3] })
    }

    /// Where values lie that are all the same.
    fn all<T: Copy>(value: T) -> Spread<T> {
        Spread { min: value, median: value, max: value }
    }

    fn look(train: &dyn Dataset, test: Option<&dyn Dataset>, threads: usize) -> Audit {
        audit(train, test, AuditConfig { threads, min_side: 32 }, |_, _| ()).expect("no thread panics")
    }

    #[test]
    fn good_images_give_no_findings() {
        let (train, mut test) = (Album::good(40), Album::good(5));
        for (place, image) in test.pictures.iter_mut().enumerate() {
            *image = picture(100 + place as u8, 64, 48);
        }
        let found = look(&train, Some(&test), 3);
        let clean = PartAudit {
            images: 40,
            class_counts: vec![20, 20],
            sizes: Some(Sizes { short_side: all(32), long_side: all(40), aspect: all(1.25) }),
            ..PartAudit::default()
        };
        assert_eq!(found.train, clean);
        let clean = PartAudit {
            images: 5,
            class_counts: vec![3, 2],
            sizes: Some(Sizes { short_side: all(48), long_side: all(64), aspect: all(0.75) }),
            ..PartAudit::default()
        };
        assert_eq!((found.test, found.leaks), (Some(clean), Vec::new()));
    }

    #[test]
    fn each_kind_of_fault_is_found() {
        let mut album = Album::good(20);
        album.pictures[3] = None;
        album.pictures[19] = None;
        album.pictures[5] = grey(32, 32);
        album.pictures[7] = picture(7, 31, 300);
        album.pictures[8] = picture(8, 300, 31);
        album.misnamed = vec![11];
        let found = look(&album, None, 2).train;
        let torn = |index| BadFile { index, key: format!("{index}.png"), reason: "torn".into() };
        assert_eq!(found.unreadable, [torn(3), torn(19)]);
        assert_eq!(found.constant, [5]);
        let tiny = [Tiny { index: 7, height: 31, width: 300 }, Tiny { index: 8, height: 300, width: 31 }];
        assert_eq!(found.tiny, tiny);
        assert_eq!(found.misnamed, [(11, Misnamed { extension: "png".into(), content: "image/bmp" })]);
        assert_eq!((found.images, found.class_counts), (20, vec![10, 10]));
        assert!(found.duplicates.is_empty());
    }

    #[test]
    fn equal_pixels_are_grouped_in_order() {
        let mut album = Album::good(50);
        for (copy, original) in [(40, 2), (30, 2), (31, 1), (10, 9)] {
            album.pictures[copy] = album.pictures[original].clone();
        }
        let found = look(&album, None, 4);
        assert_eq!(found.train.duplicates, [vec![1, 31], vec![2, 30, 40], vec![9, 10]]);
        assert_eq!((found.test, found.leaks), (None, Vec::new()));
    }

    #[test]
    fn the_same_bytes_in_another_shape_are_another_picture() {
        let tall = Album::new(vec![grey(64, 32), grey(32, 64), picture(1, 64, 32), picture(1, 32, 64)]);
        assert!(look(&tall, Some(&Album::new(vec![grey(128, 16)])), 1).leaks.is_empty());
        assert!(look(&tall, None, 1).train.duplicates.is_empty());
    }

    #[test]
    fn pictures_in_both_parts_are_leaks_and_not_duplicates() {
        let (train, mut test) = (Album::good(30), Album::good(0));
        test.pictures = [25, 200, 4, 25].map(|number| picture(number, 32, 40)).into();
        let found = look(&train, Some(&test), 2);
        let leaks = [Leak { train: vec![4], test: vec![2] }, Leak { train: vec![25], test: vec![0, 3] }];
        assert_eq!(found.leaks, leaks);
        assert!(found.train.duplicates.is_empty());
        assert_eq!(found.test.expect("given").duplicates, [vec![0, 3]]);
    }

    #[test]
    fn sizes_and_classes_are_counted() {
        let mut album = Album::new([(40, 80), (50, 50), (200, 100), (60, 90)].map(|(h, w)| picture(0, h, w)).into());
        album.classes.push("emu".into());
        let found = look(&album, None, 1).train;
        let sizes = Sizes {
            short_side: Spread { min: 40, median: 50, max: 100 },
            long_side: Spread { min: 50, median: 80, max: 200 },
            aspect: Spread { min: 0.5, median: 1.0, max: 2.0 },
        };
        assert_eq!(found.sizes, Some(sizes));
        assert_eq!((found.class_counts, found.unlabelled), (vec![2, 2, 0], 0));
        let mut plain = Plain::new(3);
        plain.labels[1] = None;
        plain.bad = vec![0, 1, 2];
        let found = look(&plain, None, 1).train;
        assert_eq!((found.sizes, found.class_counts, found.unlabelled), (None, vec![2, 0], 1));
    }

    #[test]
    fn findings_do_not_depend_on_threads_and_all_images_are_counted() {
        let mut album = Album::good(200);
        for place in (0..200).step_by(7) {
            album.pictures[place] = [None, grey(8, 8), picture(3, 32, 40)][place % 3].clone();
        }
        album.misnamed = (1..200).step_by(7).collect();
        let alone = look(&album, Some(&album), 1);
        album.slow = Some(0);
        assert_eq!(alone, look(&album, Some(&album), 5));
        assert!(alone.leaks.is_sorted_by_key(|leak| leak.train[0]), "{:?}", alone.leaks);
        let mut told = Vec::new();
        audit(&album, Some(&album), AuditConfig { threads: 0, min_side: 1 }, |done, of| told.push((done, of)))
            .expect("no thread panics");
        assert!(told.is_sorted() && told.last() == Some(&(400, 400)), "{told:?}");
    }

    #[test]
    fn a_panic_is_an_error() {
        let mut plain = Plain::new(100);
        plain.panics_at = Some(41);
        let error = audit(&plain, None, AuditConfig { threads: 2, min_side: 1 }, |_, _| ()).expect_err("poisonous");
        assert!(matches!(&error, Error::Worker { message } if message.contains("image 41")), "{error}");
    }

    #[test]
    fn names_are_compared_with_content() {
        let misnamed = |path: &str, start: &[u8]| Misnamed::of(Path::new(path), start);
        let png = b"\x89PNG\r\n\x1a\n";
        for (path, start) in [("a.png", png.as_slice()), ("a.PNG", png), ("a.jpeg", b"\xff\xd8\xff"), ("a.pgm", b"P5")]
        {
            assert_eq!(misnamed(path, start), None, "{path}");
        }
        let found = misnamed("a/b.JPG", png).expect("a PNG");
        assert_eq!((found.extension.as_str(), found.content), ("JPG", "image/png"));
        assert_eq!(misnamed("a.png", b"GIF89a").expect("a GIF").content, "image/gif");
        for unknown in [b"".as_slice(), b"a page", &png[..3]] {
            assert_eq!(misnamed("a.jpg", unknown), None, "unreadable, not misnamed");
        }
    }
}
