package attest

import "time"

// The messages M1 to M4 between a host (the attester) and the issuer (the
// verifier), as JSON over TLS 1.3. Byte strings are standard base64. TPM
// structures are in their TPM wire form: a "public" is a TPMT_PUBLIC, an
// "attest" a TPMS_ATTEST, a "signature" a TPMT_SIGNATURE.

// Key purposes, as they stand in messages.
const (
	PurposeAction  = "action"
	PurposeTLS     = "tls"
	PurposeCancel  = "cancel"  // actions too, but cancels alone: beside an action key in approver mode
	PurposeReserve = "reserve" // actions too, in a narrower scope, while no approver answers: likewise
)

// Hello is M1: who asks, from which device.
type Hello struct {
	Agent         string   `json:"agent"`
	EKCertificate []byte   `json:"ek_certificate,omitempty"` // DER, as found in NV: padding allowed (E1)
	EKChain       [][]byte `json:"ek_chain,omitempty"`       // what NV 0x01c00100..0x01c001ff hold, in their order: DER intermediates, padding allowed
	EKPublic      []byte   `json:"ek_public"`
	SRKPublic     []byte   `json:"srk_public"`
	AKPublic      []byte   `json:"ak_public"`
}

// Challenge is M2: what the evidence must contain.
type Challenge struct {
	Session    []byte           `json:"session"` // 16 bytes
	Nonce      []byte           `json:"nonce"`   // 32 bytes, one use
	Expires    time.Time        `json:"expires"`
	Credential *Credential      `json:"credential,omitempty"` // absent when the AK is the one on record
	PCRs       []PCRSelection   `json:"pcrs"`
	Keys       []KeyRequest     `json:"keys"`
	PolicyKey  []byte           `json:"policy_key"` // TPMT_PUBLIC of the issuer's policy key
	PolicyRef  []byte           `json:"policy_ref"`
	Policies   []ApprovedPolicy `json:"policies"`        // those the device may use
	Epoch      *EpochDemand     `json:"epoch,omitempty"` // absent: the device has no epochs
	// Testimony is the SHA-256 of the TPMS_ATTEST of the TPM's testimony that the
	// issuer has from the last time. Before M3 the host sends what its journal of
	// signatures has from there to the testimony in M3. Absent: there was none.
	Testimony []byte `json:"testimony,omitempty"`
}

// Credential is the output of TPM2_MakeCredential for the EK and the AK's Name.
type Credential struct {
	IDObject        []byte `json:"id_object"`        // TPM2B_ID_OBJECT contents
	EncryptedSecret []byte `json:"encrypted_secret"` // TPM2B_ENCRYPTED_SECRET contents
}

// KeyRequest asks for a key made from a template.
type KeyRequest struct {
	Purpose    string `json:"purpose"`
	Protection string `json:"protection,omitempty"` // ProtectionHSM, or empty for a key in the TPM
	Mode       string `json:"mode,omitempty"`       // ModeApprover, ModeReserve, or empty: local
	Vendor     string `json:"vendor,omitempty"`     // of a key in an HSM: the format of the evidence that is asked for
	Template   []byte `json:"template,omitempty"`   // of a key in the TPM: TPMT_PUBLIC; unique is empty
}

// ProtectionHSM asks for a key in an HSM of the host. The TPM does not certify
// it; the quote binds it to the host's state.
const ProtectionHSM = "hsm"

// Evidence is M3.
type Evidence struct {
	Session []byte        `json:"session"`
	Secret  []byte        `json:"secret,omitempty"` // from TPM2_ActivateCredential
	PCRs    []PCRValue    `json:"pcrs"`             // in the order of the selection
	Quote   Attested      `json:"quote"`
	Keys    []KeyEvidence `json:"keys"`            // in the order of the requests
	Epoch   *Attested     `json:"epoch,omitempty"` // the epoch counter (TPM2_NV_Certify)
	Audit   *Attested     `json:"audit,omitempty"` // the TPM's testimony about its signatures (TPM2_GetCommandAuditDigest); absent where it gives none
}

// Attested is a TPMS_ATTEST and the AK's signature over it.
type Attested struct {
	Attest    []byte `json:"attest"`
	Signature []byte `json:"signature"`
}

// KeyEvidence shows that a key is in the device and that its holder asks for
// the certificate.
type KeyEvidence struct {
	Purpose string    `json:"purpose"`
	Public  []byte    `json:"public,omitempty"`  // of a key in the TPM
	SPKI    []byte    `json:"spki,omitempty"`    // of a key in an HSM: DER SubjectPublicKeyInfo
	Vendor  []byte    `json:"vendor,omitempty"`  // of a key in an HSM: what its maker says of it
	CSR     []byte    `json:"csr,omitempty"`     // DER PKCS#10, signed by the key; of a key that approvers stand before none
	Certify *Attested `json:"certify,omitempty"` // of a key in the TPM
}

// Grant is M4.
type Grant struct {
	Certificates []Issued         `json:"certificates"`
	Policies     []ApprovedPolicy `json:"policies"`
	RenewAfter   time.Time        `json:"renew_after"`
}

// Issued is one certificate with its chain, leaf first, without the root.
type Issued struct {
	Purpose string   `json:"purpose"`
	Chain   [][]byte `json:"chain"`
}

// PCRSelection names PCRs of one bank, in ascending order.
type PCRSelection struct {
	Bank    string `json:"bank"` // sha256 or sha384
	Indexes []int  `json:"indexes"`
}

// PCRValue is the value of one PCR of one bank.
type PCRValue struct {
	Bank   string `json:"bank"`
	Index  int    `json:"index"`
	Digest []byte `json:"digest"`
}

// ApprovedPolicy is a set of PCR reference values that the policy key approved
// (TPM2_PolicyAuthorize): the host's keys work while its PCRs have these values.
// With approvers it is for keys in approver mode, and the TPM demands an
// authorization of each of them for each signature (TPM2_PolicySigned). With reserve
// it is for keys in reserve mode, and the TPM demands a consent of the one approver that it names.
type ApprovedPolicy struct {
	Name      string     `json:"name"`
	PCRs      []PCRValue `json:"pcrs"`                // ordered by bank, then index
	Approvers [][]byte   `json:"approvers,omitempty"` // TPMT_PUBLIC of each
	Reserve   bool       `json:"reserve,omitzero"`    // see above
	Epoch     uint64     `json:"epoch,omitzero"`      // it ends when the host's epoch counter is above; 0: it does not
	Signature []byte     `json:"signature"`           // TPMT_SIGNATURE of the policy key over H(policy digest | policyRef of the mode)
}
