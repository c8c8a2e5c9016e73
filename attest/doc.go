// Package attest decides what evidence from a TPM proves: [VerifyEK] whether an
// endorsement key is a TPM's, [Appraise] whether the keys that ask for
// certificates are in that TPM, on a host in an approved state, in this very
// exchange.
//
// It is pure: bytes in, a result or a [Refusal] out. It opens no device, no
// file and no connection, and reads no clock. docs/attestation.md lists its checks.
package attest
