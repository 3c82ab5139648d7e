//! object_store's clients, made of a replica's options.
//!
//! Owns the mapping from our option names to object_store's keys, with every deadline set. The clouds' usual environment variables come first,
//! the replica's own options override them.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{BackoffConfig, ClientConfigKey, RetryConfig};

use super::super::digest::Crypto;
use super::{Place, ReplicaSpec};

impl ReplicaSpec {
    pub(super) fn retry(&self) -> RetryConfig {
        RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(50),
                max_backoff: Duration::from_millis(500),
                base: 2.0,
            },
            // Our own callers wait and try again; here it is only for connections that went stale.
            max_retries: 1,
            retry_timeout: self.limits.call,
        }
    }

    /// The client options every cloud gets: a connection deadline of ours, none on transfers (they get one by their size).
    pub(super) fn client(&self) -> [(ClientConfigKey, String); 2] {
        [
            (ClientConfigKey::ConnectTimeout, format!("{} ms", self.limits.connect.as_millis())),
            (ClientConfigKey::Timeout, "1 day".to_owned()),
        ]
    }

    pub(super) fn s3(&self) -> AmazonS3Builder {
        let Place::Bucket { bucket, .. } = &self.place else { return AmazonS3Builder::new() };
        let mut b = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(self.retry());
        for (key, value) in self.client() {
            b = b.with_config(AmazonS3ConfigKey::Client(key), value);
        }
        b = match self.option("checksum") {
            Some("none") => b,
            Some("crc64nvme") => b.with_checksum_algorithm(Checksum::CRC64NVME),
            _ => b.with_checksum_algorithm(Checksum::SHA256),
        };
        b = b.with_conditional_put(match self.conditional() {
            true => S3ConditionalPut::ETagMatch,
            false => S3ConditionalPut::Disabled,
        });
        for (option, key) in [
            ("endpoint", AmazonS3ConfigKey::Endpoint),
            ("region", AmazonS3ConfigKey::Region),
            ("access_key_id", AmazonS3ConfigKey::AccessKeyId),
            ("secret_access_key", AmazonS3ConfigKey::SecretAccessKey),
            ("session_token", AmazonS3ConfigKey::Token),
            ("allow_http", AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp)),
            ("virtual_hosted_style", AmazonS3ConfigKey::VirtualHostedStyleRequest),
            ("anonymous", AmazonS3ConfigKey::SkipSignature),
        ] {
            if let Some(value) = self.option(option) {
                b = b.with_config(key, value);
            }
        }
        // A key pair given for this replica must not be joined by another one's session token from the environment.
        if self.option("access_key_id").is_some() && self.option("session_token").is_none() {
            b = clear_token(b);
        }
        b.with_crypto_provider(Arc::new(Crypto))
    }

    pub(super) fn gs(&self) -> GoogleCloudStorageBuilder {
        let Place::Bucket { bucket, .. } = &self.place else { return GoogleCloudStorageBuilder::new() };
        // Credentials given for this replica replace those of the environment instead of clashing with them.
        let own = ["service_account", "service_account_key", "application_credentials", "bearer_token"];
        let mut b = match own.iter().any(|o| self.option(o).is_some()) {
            true => GoogleCloudStorageBuilder::new(),
            false => GoogleCloudStorageBuilder::from_env(),
        };
        b = b.with_bucket_name(bucket).with_retry(self.retry());
        for (key, value) in self.client() {
            b = b.with_config(GoogleConfigKey::Client(key), value);
        }
        let allow_http = self.flag("allow_http").to_string();
        b = b.with_config(GoogleConfigKey::Client(ClientConfigKey::AllowHttp), allow_http);
        for (option, key) in [
            ("base_url", GoogleConfigKey::BaseUrl),
            ("service_account", GoogleConfigKey::ServiceAccount),
            ("service_account_key", GoogleConfigKey::ServiceAccountKey),
            ("application_credentials", GoogleConfigKey::ApplicationCredentials),
            ("bearer_token", GoogleConfigKey::BearerToken),
            ("anonymous", GoogleConfigKey::SkipSignature),
        ] {
            if let Some(value) = self.option(option) {
                b = b.with_config(key, value);
            }
        }
        b
    }

    pub(super) fn az(&self) -> MicrosoftAzureBuilder {
        let Place::Bucket { bucket, .. } = &self.place else { return MicrosoftAzureBuilder::new() };
        let mut b = MicrosoftAzureBuilder::from_env().with_container_name(bucket).with_retry(self.retry());
        for (key, value) in self.client() {
            b = b.with_config(AzureConfigKey::Client(key), value);
        }
        for (option, key) in [
            ("account", AzureConfigKey::AccountName),
            ("account_key", AzureConfigKey::AccessKey),
            ("sas_token", AzureConfigKey::SasKey),
            ("bearer_token", AzureConfigKey::Token),
            ("client_id", AzureConfigKey::ClientId),
            ("client_secret", AzureConfigKey::ClientSecret),
            ("tenant_id", AzureConfigKey::AuthorityId),
            ("endpoint", AzureConfigKey::Endpoint),
            ("emulator", AzureConfigKey::UseEmulator),
            ("allow_http", AzureConfigKey::Client(ClientConfigKey::AllowHttp)),
            ("anonymous", AzureConfigKey::SkipSignature),
        ] {
            if let Some(value) = self.option(option) {
                b = b.with_config(key, value);
            }
        }
        b
    }
}

/// object_store has no way to take a token back except a new builder: an empty one is sent as none by no server, so the
/// builder is made afresh from what was set.
fn clear_token(b: AmazonS3Builder) -> AmazonS3Builder {
    if b.get_config_value(&AmazonS3ConfigKey::Token).is_none() {
        return b;
    }
    let mut fresh = AmazonS3Builder::new();
    for key in [
        AmazonS3ConfigKey::AccessKeyId,
        AmazonS3ConfigKey::SecretAccessKey,
        AmazonS3ConfigKey::Region,
        AmazonS3ConfigKey::Bucket,
        AmazonS3ConfigKey::Endpoint,
        AmazonS3ConfigKey::VirtualHostedStyleRequest,
        AmazonS3ConfigKey::SkipSignature,
        AmazonS3ConfigKey::Checksum,
        AmazonS3ConfigKey::ConditionalPut,
        AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp),
        AmazonS3ConfigKey::Client(ClientConfigKey::ConnectTimeout),
        AmazonS3ConfigKey::Client(ClientConfigKey::Timeout),
    ] {
        if let Some(value) = b.get_config_value(&key) {
            fresh = fresh.with_config(key, value);
        }
    }
    fresh
}
