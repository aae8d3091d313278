//! `images`: what is in the store.

use anyhow::Result;
use clap::ArgMatches;

use super::client::{Client, called};
use super::{Command, Context};
use crate::api::v1;

pub(super) struct Images;

#[async_trait::async_trait]
impl Command for Images {
    fn name(&self) -> &'static str {
        "images"
    }
    fn about(&self) -> &'static str {
        "List images"
    }
    async fn run(&self, context: &Context, _: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let images = called(client.image.list_images(v1::ListImagesRequest::default()).await)?.images;
        println!("{:<60} {:<15} {:>10}", "IMAGE", "ID", "MIB");
        for image in images {
            let name = image.repo_tags.first().or(image.repo_digests.first()).map_or("<none>", String::as_str);
            let id = image.id.trim_start_matches("sha256:");
            println!("{name:<60} {:<15} {:>10.1}", &id[..id.len().min(13)], image.size as f64 / f64::from(1 << 20));
        }
        Ok(0)
    }
}
