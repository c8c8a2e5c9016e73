package attest

import "fmt"

// Refusal says which check refused evidence. Its name is stable: tests,
// decision logs and documents use it.
type Refusal struct {
	Check  string // such as K3
	Detail string // one sentence
}

func (r *Refusal) Error() string { return r.Check + ": " + r.Detail }

// Is makes errors.Is(err, &Refusal{Check: c}) ask for the check.
func (r *Refusal) Is(target error) bool {
	t, ok := target.(*Refusal)
	return ok && t.Check == r.Check
}

func refuse(check, format string, a ...any) error {
	return &Refusal{check, fmt.Sprintf(format, a...)}
}

// Check is one thing that evidence must satisfy.
type Check struct{ ID, What string }

// Checks lists every check by its stable name, in the order of
// docs/attestation.md. Those that need memory (E9, A3, K8, Q3, C3, G1, G3, G6, G10, source_network, source_region) are
// held by package issuer.
var Checks = []Check{
	{"E1", "the EK certificate is the one certificate at the start of what NV holds; only padding follows"},
	{"E2", "the EK certificate chains to a root that the operator pinned; no URL that the host names is followed"},
	{"E3", "a critical subject alternative name is accepted only if it names TPM manufacturer, model and version; no other unknown critical extension is"},
	{"E4", "the EK certificate is an end entity's, has the EK certificate's extended key usage, and a key usage that fits its key"},
	{"E5", "the EK certificate is valid in time, or the device's record allows an expired one; a revoked one never is"},
	{"E6", "the EK certificate's key is the EK's"},
	{"E7", "the EK is a restricted decryption key of a TCG template; it cannot sign"},
	{"E8", "the EK is RSA of at least 2048 bits or on P-256, P-384 or P-521, and no RSA key with the ROCA weakness"},
	{"E9", "one EK is one device with one AK; another AK needs an operator"},
	{"E10", "without a certificate the EK is one that an operator pinned by its SHA-256"},
	{"E11", "a device that is not pinned shows an EK certificate; none is not one that verifies"},
	{"A1", "the AK is a restricted P-256 signing key with the fixed scheme ECDSA with SHA-256, made in this TPM and bound to it"},
	{"A2", "the AK's Name is computed from its public area, never taken from the host"},
	{"A3", "only the TPM with this EK and this AK could open the secret; it is used once"},
	{"K1", "the key's certification is a TPM's, signed by the AK, and of the type certify"},
	{"K2", "the certified key, the key in the message and the key of the certificate request are one, and the request is signed by it; a key in approver or reserve mode has no request, since it signs nothing but statements"},
	{"K3", "the key was made in this TPM, cannot leave it, signs, is used by no password, and has the expected authPolicy: that of the mode that the inventory asks for"},
	{"K4", "the certification carries this exchange, this TLS channel and this certificate request"},
	{"K5", "the certification was signed by the AK in its place in the endorsement hierarchy"},
	{"K7", "the key stands below the storage root key of the owner hierarchy"},
	{"K8", "the key has no certificate that was revoked since the key was compromised"},
	{"Q1", "the quote is signed by the AK on record with its fixed scheme"},
	{"Q2", "the quote is a TPM's and of the type quote"},
	{"Q3", "the quote carries this exchange, this TLS channel, and every key with its request"},
	{"Q4", "the PCRs inside the quote are exactly those asked for, and its digest is that of the values sent"},
	{"Q5", "PCRs that anyone can reset never decide"},
	{"Q6", "the TPM's clock is safe and, like its reset counts, never goes back"},
	{"Q7", "the TPM's firmware is not older than the device's record demands"},
	{"Q8", "only banks that were asked for are quoted"},
	{"H1", "a vendor's evidence about a key in an HSM is there when it is asked for, and only then, of the format asked for, bounded and well formed"},
	{"H2", "the vendor's evidence is signed by a device whose certificate leads to a root that the operator pinned for it"},
	{"H3", "the vendor's evidence is about the key that is to be certified"},
	{"H4", "the key was made in the HSM: not imported, not unwrapped"},
	{"H5", "the key cannot leave the HSM, and never could"},
	{"H7", "every claim that decides is there, and has its one form"},
	{"H8", "the key is in the device that vouches for it, and the device's debugging is off"},
	{"H9", "the key has not expired by the HSM's own account"},
	{"U1", "a host without a TPM is in the inventory as such, with the SHA-256 of the one key, in an HSM, that may be certified for it"},
	{"U2", "its certificate request is signed by that key and carries this TLS channel"},
	{"U3", "a scope that bounds the age of the attestation is certified for no host without one"},
	{"N1", "the epoch counter's certification is there when it is asked for, and only then: a TPM's, signed by the AK, of the type NV, carrying this exchange and this TLS channel"},
	{"N2", "the epoch counter is an index of the one definition that approvals name: a counter"},
	{"N3", "the epoch is at least what the operator demands, and never goes back"},
	{"C1", "the TPM's testimony about its signatures is there if the device ever gave one, and is a TPM's, signed by the AK, of the type command audit, and carries this exchange and this TLS channel"},
	{"C2", "the TPM that testifies audits TPM2_Sign, and its audit counter never goes back"},
	{"C3", "every signature that the TPM testifies to since the last time is in the host's journal, which was not changed: the chain recomputed from it leads to the testimony"},
	{"P1", "the PCR values are those of a policy that the policy key approved for this device and keys of this mode"},
	{"G1", "any error ends refused, and a failed exchange stays failed"},
	{"G2", "no input crashes the appraisal"},
	{"G3", "the admin API is apart from the agent API and asks for an administrator's certificate"},
	{"G4", "only bytes whose signature was verified decide"},
	{"G6", "TLS sessions are not resumed"},
	{"G7", "sizes, chains and exponents are bounded, and requests are limited, before expensive work"},
	{"G8", "quote, certifications, requests and TLS channel are bound to each other"},
	{"G10", "one function issues certificates"},
	{"source_network", "where the agent's scope names networks, the host calls from one of them"},
	{"source_region", "where the agent's scope names regions, the host is known to call from one of them"},
}
