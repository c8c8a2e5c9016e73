package tpm

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
)

// Info is what a TPM says of itself.
type Info struct {
	Manufacturer string   `json:"manufacturer"` // four letters of the TCG's registry
	Model        string   `json:"model"`        // vendor strings
	Firmware     string   `json:"firmware"`
	Level        uint32   `json:"level"`
	Revision     uint32   `json:"revision"` // of the specification, times 100
	Banks        []string `json:"banks"`    // PCR banks that are in use
	Missing      []string `json:"missing"`  // algorithms, curves and commands that Inkan needs and the TPM lacks
	CommandAudit bool     `json:"command_audit"`

	TransientObjects  uint32 `json:"transient_objects"` // at a time, free ones
	ActiveSessions    uint32 `json:"active_sessions"`   // free ones
	NVCounters        uint32 `json:"nv_counters"`       // that can still be made; 0 may mean no fixed number
	Orderly           uint32 `json:"orderly_count"`     // what an orderly counter may lose in a crash
	LockoutCounter    uint32 `json:"lockout_counter"`
	MaxAuthFail       uint32 `json:"max_auth_fail"`
	LockedOut         bool   `json:"locked_out"`
	OwnerAuthSet      bool   `json:"owner_auth_set"`
	EndorsementSet    bool   `json:"endorsement_auth_set"`
	LockoutAuthSet    bool   `json:"lockout_auth_set"`
	ClockMilliseconds uint64 `json:"clock_ms"`
	ResetCount        uint32 `json:"reset_count"`
	RestartCount      uint32 `json:"restart_count"`
	ClockSafe         bool   `json:"clock_safe"`
}

// Bits of TPMA_PERMANENT (Part 2, section 8.6).
const (
	ownerAuthSet       = 1 << 0
	endorsementAuthSet = 1 << 1
	lockoutAuthSet     = 1 << 2
	inLockout          = 1 << 9
)

// What Inkan needs of a TPM.
var (
	neededAlgorithms = map[string]tpm2.TPMAlgID{"SHA-256": tpm2.TPMAlgSHA256, "ECDSA": tpm2.TPMAlgECDSA, "ECC": tpm2.TPMAlgECC, "AES": tpm2.TPMAlgAES, "CFB": tpm2.TPMAlgCFB, "KEYEDHASH": tpm2.TPMAlgKeyedHash}
	neededCommands   = []tpm2.TPMCC{tpm2.TPMCCCreate, tpm2.TPMCCCreatePrimary, tpm2.TPMCCLoad, tpm2.TPMCCSign, tpm2.TPMCCQuote, tpm2.TPMCCCertify, tpm2.TPMCCActivateCredential, tpm2.TPMCCPolicyPCR,
		tpm2.TPMCCPolicyAuthorize, tpm2.TPMCCPolicySigned, tpm2.TPMCCPolicySecret, tpm2.TPMCCPolicyNV, tpm2.TPMCCVerifySignature, tpm2.TPMCCLoadExternal, tpm2.TPMCCNVDefineSpace, tpm2.TPMCCNVIncrement, tpm2.TPMCCUnseal}
)

// Info asks the TPM about itself. It changes nothing.
func (d *Device) Info() (info *Info, err error) {
	err = d.do("asking the TPM about itself", func() (err error) {
		info, err = d.info()
		return err
	})
	return info, err
}

// capability reads a list that a TPM may give in parts.
func (d *Device) capability(which tpm2.TPMCap, first uint32, each func(*tpm2.TPMUCapabilities) (next uint32, err error)) error {
	for range 64 { // far more parts than any TPM needs
		rsp, err := tpm2.GetCapability{Capability: which, Property: first, PropertyCount: 128}.Execute(d.link)
		if err != nil {
			return err
		}
		next, err := each(&rsp.CapabilityData.Data)
		if err != nil || !rsp.MoreData || next <= first {
			return err
		}
		first = next
	}
	return fmt.Errorf("the TPM's list of capability %d has no end", which)
}

func (d *Device) properties(first uint32) (map[tpm2.TPMPT]uint32, error) {
	out := make(map[tpm2.TPMPT]uint32)
	err := d.capability(tpm2.TPMCapTPMProperties, first, func(u *tpm2.TPMUCapabilities) (uint32, error) {
		list, err := u.TPMProperties()
		if err != nil {
			return 0, err
		}
		var last uint32
		for _, p := range list.TPMProperty {
			out[p.Property], last = p.Value, uint32(p.Property)+1
		}
		return last, nil
	})
	return out, err
}

func (d *Device) info() (*Info, error) {
	fixed, err := d.properties(uint32(tpm2.TPMPTFamilyIndicator))
	if err != nil {
		return nil, err
	}
	variable, err := d.properties(uint32(tpm2.TPMPTPermanent))
	if err != nil {
		return nil, err
	}
	text := func(list ...tpm2.TPMPT) string {
		var b []byte
		for _, p := range list {
			b = binary.BigEndian.AppendUint32(b, fixed[p])
		}
		return strings.Map(func(r rune) rune {
			if r < ' ' || r > '~' {
				return -1 // vendors pad with zeros
			}
			return r
		}, string(b))
	}
	v1, v2 := fixed[tpm2.TPMPTFirmwareVersion1], fixed[tpm2.TPMPTFirmwareVersion2]
	permanent := variable[tpm2.TPMPTPermanent]
	out := &Info{
		Manufacturer: text(tpm2.TPMPTManufacturer),
		Model:        strings.TrimSpace(text(tpm2.TPMPTVendorString1, tpm2.TPMPTVendorString2, tpm2.TPMPTVendorString3, tpm2.TPMPTVendorString4)),
		Firmware:     fmt.Sprintf("%d.%d.%d.%d", v1>>16, v1&0xffff, v2>>16, v2&0xffff),
		Level:        fixed[tpm2.TPMPTLevel], Revision: fixed[tpm2.TPMPTRevision], Orderly: fixed[tpm2.TPMPTOrderlyCount],
		TransientObjects: variable[tpm2.TPMPTHRTransientAvail], ActiveSessions: variable[tpm2.TPMPTHRActiveAvail], NVCounters: variable[tpm2.TPMPTNVCountersAvail],
		LockoutCounter: variable[tpm2.TPMPTLockoutCounter], MaxAuthFail: variable[tpm2.TPMPTMaxAuthFail],
		LockedOut: permanent&inLockout != 0, OwnerAuthSet: permanent&ownerAuthSet != 0, EndorsementSet: permanent&endorsementAuthSet != 0, LockoutAuthSet: permanent&lockoutAuthSet != 0,
		Missing: []string{},
	}
	clock, err := tpm2.ReadClock{}.Execute(d.link)
	if err != nil {
		return nil, err
	}
	c := clock.CurrentTime.ClockInfo
	out.ClockMilliseconds, out.ResetCount, out.RestartCount, out.ClockSafe = c.Clock, c.ResetCount, c.RestartCount, bool(c.Safe)
	if err := d.banks(out); err != nil {
		return nil, err
	}
	return out, d.abilities(out)
}

func (d *Device) banks(out *Info) error {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(d.link)
	if err != nil {
		return err
	}
	list, err := rsp.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return err
	}
	names := map[tpm2.TPMAlgID]string{tpm2.TPMAlgSHA1: "sha1", tpm2.TPMAlgSHA256: "sha256", tpm2.TPMAlgSHA384: "sha384", tpm2.TPMAlgSHA512: "sha512"}
	for _, s := range list.PCRSelections {
		if !slices.ContainsFunc(s.PCRSelect, func(b byte) bool { return b != 0 }) {
			continue
		}
		name := names[s.Hash]
		if name == "" {
			name = fmt.Sprintf("%#x", uint16(s.Hash))
		}
		out.Banks = append(out.Banks, name)
	}
	return nil
}

// abilities lists what is missing of algorithms, curves and commands.
func (d *Device) abilities(out *Info) error {
	algorithms, commands, curves := make(map[tpm2.TPMAlgID]bool), make(map[tpm2.TPMCC]bool), make(map[tpm2.TPMECCCurve]bool)
	err := d.capability(tpm2.TPMCapAlgs, 0, func(u *tpm2.TPMUCapabilities) (next uint32, err error) {
		list, err := u.Algorithms()
		if err != nil {
			return 0, err
		}
		for _, a := range list.AlgProperties {
			algorithms[a.Alg], next = true, uint32(a.Alg)+1
		}
		return next, nil
	})
	if err != nil {
		return err
	}
	if err := d.capability(tpm2.TPMCapECCCurves, 0, func(u *tpm2.TPMUCapabilities) (next uint32, err error) {
		list, err := u.ECCCurves()
		if err != nil {
			return 0, err
		}
		for _, c := range list.ECCCurves {
			curves[c], next = true, uint32(c)+1
		}
		return next, nil
	}); err != nil {
		return err
	}
	if err := d.capability(tpm2.TPMCapCommands, 0, func(u *tpm2.TPMUCapabilities) (next uint32, err error) {
		list, err := u.Command()
		if err != nil {
			return 0, err
		}
		for _, c := range list.CommandAttributes {
			cc := tpm2.TPMCC(c.CommandIndex)
			commands[cc], next = true, uint32(cc)+1
		}
		return next, nil
	}); err != nil {
		return err
	}
	for name, a := range neededAlgorithms {
		if !algorithms[a] {
			out.Missing = append(out.Missing, name)
		}
	}
	if !curves[tpm2.TPMECCNistP256] {
		out.Missing = append(out.Missing, "P-256")
	}
	for _, c := range neededCommands {
		if !commands[c] {
			out.Missing = append(out.Missing, fmt.Sprintf("TPM2_%v", c))
		}
	}
	slices.Sort(out.Missing)
	out.CommandAudit = commands[tpm2.TPMCCSetCommandCodeAuditStatus] && commands[tpm2.TPMCCGetCommandAuditDigest]
	return nil
}
