//! Backends of our own against object_store's conformance tests, and the faults against what they promise.

use object_store::integration;
use object_store::memory::InMemory;
use object_store::{DynObjectStore, GetOptions};

use super::super::folder::Folder;
use super::super::store::Limits;
use super::*;

/// Everything that object_store expects of any store, in its own order: some begin with an empty one. Deletes what is there.
async fn conforms(store: &DynObjectStore, compares_versions: bool) {
    integration::put_get_delete_list(store).await;
    integration::get_opts(store).await;
    integration::list_uses_directories_correctly(store).await;
    integration::list_with_delimiter(store).await;
    integration::list_with_offset_exclusivity(store).await;
    integration::get_nonexistent_object(store, None).await.unwrap_err();
    integration::rename_and_copy(store).await;
    integration::copy_if_not_exists(store).await;
    integration::copy_rename_nonexistent_object(store).await;
    integration::stream_get(store).await;
    integration::put_opts(store, compares_versions).await;
}

#[tokio::test]
async fn the_wrapper_conforms_while_no_fault_is_set() {
    let faults = Faults::new(1);
    let store = faults.wrap(Arc::new(InMemory::new()));
    conforms(&*store, true).await;
    integration::put_get_attributes(&*store).await;
    integration::multipart_out_of_order(&*store).await;
    integration::multipart_race_condition(&*store, true).await;
    // Neither does it after faults came and went.
    faults.add(Rule::always(Fault::Before(ErrorKind::Transient), &[]));
    faults.partition(true);
    store.get_opts(&Path::from("x"), GetOptions::new()).await.unwrap_err();
    faults.clear();
    conforms(&*store, true).await;
    assert_eq!(faults.struck(), 1);
}

#[tokio::test]
async fn a_folder_conforms() {
    let dir = tempfile::tempdir().unwrap();
    conforms(&Folder::new(dir.path().to_owned()), false).await;
}

#[tokio::test]
async fn a_rate_is_shared_by_all_who_transfer() {
    let (faults, memory) = (Faults::new(1), Memory::new());
    let limits = Limits { call: Duration::from_secs(100), ..Limits::default() };
    let store = memory.store("r".parse().unwrap(), limits, &faults);
    faults.add(Rule::always(Fault::Rate(20_000), &[]));
    let body = || Bytes::from(vec![7; 2000]);
    let began = Instant::now();
    let (a, b) = tokio::join!(store.put("a", body()), store.put("b", body()));
    a.and(b).unwrap();
    // 200 ms, less what a timer may be early.
    assert!(began.elapsed() > Duration::from_millis(190), "{:?}", began.elapsed());
    let began = Instant::now();
    assert_eq!(store.get_range("a", 0, 1000).await.unwrap().len(), 1000);
    assert!(began.elapsed() > Duration::from_millis(45), "{:?}", began.elapsed());
}

#[tokio::test]
async fn memory_is_changed_behind_the_back_of_its_stores() {
    let memory = Memory::new();
    let store = memory.plain("r".parse().unwrap());
    store.put("dir/a", Bytes::from_static(b"aaaa")).await.unwrap();
    let before = memory.objects();
    store.put("dir/b", Bytes::from_static(b"bbbb")).await.unwrap();
    assert!(memory.flip("dir/a", 8) && memory.cut("dir/b", 1) && !memory.cut("dir/b", 1));
    assert_eq!(&store.get("dir/a").await.unwrap()[..], b"a`aa");
    assert_eq!(&store.get("dir/b").await.unwrap()[..], b"b");
    assert!(memory.lose("dir/b") && !memory.lose("dir/b") && !memory.flip("dir/b", 0));
    store.put("dir/c", Bytes::new()).await.unwrap();
    memory.set(&before);
    assert_eq!(memory.objects(), before);
    assert_eq!(store.list("").await.unwrap().len(), 1);
}
