//! The gRPC contract `omsign.v1` between `omsign` and `omsign-agent`, as generated from
//! `omsign/v1/agent.proto`. The meaning and the unit of every field are documented there.

/// Version 1 of the contract.
#[allow(clippy::all, clippy::unwrap_used, unreachable_pub)] // not missing_docs: every message and field has a comment
pub mod v1 {
    tonic::include_proto!("omsign.v1");

    /// Longest `statement`, in bytes. Larger ones are for keys that sign digests.
    pub const LARGEST_STATEMENT_BYTES: usize = 15 << 20;

    /// Where a status says when to come again, in milliseconds: what clients with a retry policy go by, too (gRPC A6).
    pub const RETRY_PUSHBACK: &str = "grpc-retry-pushback-ms";

    /// The compiled descriptors, for the gRPC reflection service.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/omsign.bin"));
}

impl std::fmt::Debug for v1::UnlockTokenRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pin = self.pin.as_ref().map(|_| "…");
        f.debug_struct("UnlockTokenRequest").field("token", &self.token).field("pin", &pin).finish()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn debug_does_not_print_the_pin() {
        let request = super::v1::UnlockTokenRequest { token: "t".into(), pin: Some("431276".into()) };
        assert!(!format!("{request:?}").contains("431276"));
    }
}
