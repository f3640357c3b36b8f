//! `predict`: classes of files, as `evaluate` would give them.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::support::{Ran, bitmap_of, fails, ran, selfie, text, works, write};
use serde_json::Value;

/// Images of 32 pixels in two class folders of a training and a test part: dark ones and bright ones.
fn data(folder: &Path) -> PathBuf {
    let data = folder.join("data");
    for i in 0..12u8 {
        let class = ["bright", "dark"][usize::from(i % 2)];
        let base = if i % 2 == 0 { 170 } else { 20 };
        let part = if i < 8 { "train" } else { "val" };
        let image = bitmap_of(32, |at| base + (at as u8).wrapping_mul(i + 3) % 60);
        write(&data.join(part).join(class).join(format!("{i:02}.bmp")), &image);
    }
    data
}

fn finetuned(folder: &Path, data: &Path) -> PathBuf {
    let run = folder.join("fine");
    let more = "--preset tiny --image-size 32 --batch 8 --steps 12 --init scratch";
    works(&format!("finetune --data {} --out {} {more}", text(data), text(&run)));
    run
}

fn lines(ran: &Ran) -> Vec<Value> {
    ran.out.lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect()
}

#[test]
fn a_folder_is_classified_as_evaluate_does() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = data(folder.path());
    let run = finetuned(folder.path(), &data);
    let predict = |more: &str| works(&format!("predict {} {more}", text(&run)));
    let val = data.join("val");
    let found = lines(&predict(&format!("{} --json", text(&val))));
    assert_eq!(found.len(), 4);
    let mut right = 0;
    for line in &found {
        let name = line["name"].as_str().expect("a name");
        let predictions = line["predictions"].as_array().expect("a list");
        let probability = |i: usize| predictions[i]["probability"].as_f64().expect("a number");
        assert!((probability(0) + probability(1) - 1.0).abs() < 1e-12 && probability(0) >= probability(1), "{line}");
        right += usize::from(name.contains(predictions[0]["class"].as_str().expect("a class")));
        assert!(Path::new(name).is_file(), "the name is the file's: {name}");
    }
    let evaluated = works(&format!("evaluate {} --data {} --json", text(&run), text(&data))).json();
    assert_eq!(evaluated["top1"].as_f64(), Some(right as f64 / 4.0));

    // The same by names, in any batch; and what is asked of it alone.
    let names: Vec<String> = found.iter().map(|line| line["name"].as_str().expect("a name").to_string()).collect();
    for more in ["--batch 1", "--batch 3 --threads 2 --workers 0"] {
        assert_eq!(lines(&predict(&format!("{} --json {more}", names.join(" ")))), found, "{more}");
    }
    let csv = predict(&format!("{} --csv --top 1", names.join(" "))).out;
    let csv: Vec<&str> = csv.lines().collect();
    assert_eq!((csv.len(), csv[0]), (5, "name,rank,class,probability"));
    let first = &found[0]["predictions"][0];
    assert_eq!(
        csv[1],
        format!("{},1,{},{}", names[0], first["class"].as_str().expect("a class"), first["probability"])
    );
    let words = predict(&format!("{} --top 9", names[0])).out;
    assert!(
        words.starts_with(&format!("{}: ", names[0])) && words.contains("bright") && words.contains("dark"),
        "{words}"
    );

    let mut child = selfie(&format!("predict {} - --json", text(&run)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let list = names.join("\r\n") + "\n\n";
    child.stdin.take().expect("piped").write_all(list.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let out = String::from_utf8(output.stdout).expect("text");
    assert_eq!(lines(&Ran { code: None, out, err: String::new() }), found);
}

#[test]
fn a_bad_file_is_named_and_the_rest_goes_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = data(folder.path());
    let run = finetuned(folder.path(), &data);
    let (torn, good) = (folder.path().join("torn.jpg"), data.join("val/dark/09.bmp"));
    write(&torn, b"not a picture");
    let line = format!("predict {} {} {} nowhere.png --json", text(&run), text(&torn), text(&good));
    let found = ran(&mut selfie(&line));
    assert_eq!(found.code, Some(3), "{}", found.err);
    found.says(&["torn.jpg", "nowhere.png", "2 of the images"]);
    let lines = lines(&found);
    assert_eq!(lines.len(), 3);
    assert!(lines[0]["error"].is_string() && lines[1]["predictions"].is_array() && lines[2]["error"].is_string());
    let all_bad = ran(&mut selfie(&format!("predict {} {}", text(&run), text(&torn))));
    assert_eq!((all_bad.code, all_bad.out.as_str()), (Some(3), ""), "{}", all_bad.err);
}

#[test]
fn what_cannot_be_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pre = folder.path().join("pre");
    works(&format!("pretrain --data synthetic:train=20,test=8 --out {} --preset tiny --batch 8 --steps 2", text(&pre)));
    fails(&format!("predict {} x.png", text(&pre)), 3, &["pretraining run", "finetune"]);
    fails("predict nowhere x.png", 3, &["nowhere"]);
    let data = data(folder.path());
    let run = finetuned(folder.path(), &data);
    fails(&format!("predict {} x.png --batch 0", text(&run)), 2, &["train.batch"]);
    fails(&format!("predict {} x.png --device gpu", text(&run)), 2, &["gpu"]);
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).expect("a folder");
    fails(&format!("predict {} {}", text(&run), text(&empty)), 3, &["0 images"]);
    let nothing = ran(selfie(&format!("predict {} -", text(&run))).stdin(Stdio::null()));
    assert_eq!(nothing.code, Some(3), "{}", nothing.err);
    nothing.says(&["standard input", "found none"]);
    let weights = run.join("weights/config.json");
    let config = fs::read_to_string(&weights).expect("written").replace("\"dark\"", "7");
    write(&weights, config.as_bytes());
    fails(&format!("predict {} x.png", text(&run)), 3, &["2 classes", "found 1"]);
}
