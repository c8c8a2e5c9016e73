package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"inkan/attest"
	"inkan/hsm"
	"inkan/internal/attester"
	"inkan/internal/keyuri"
	"inkan/internal/problem"
	"inkan/journal"
	"inkan/signer"
	"inkan/tpm"
)

// States of a finding.
const (
	stateOK      = "ok"
	stateNote    = "note"    // worth knowing
	stateRefused = "refused" // something will be refused because of it
)

// finding is one line of the doctor's report.
type finding struct {
	Area  string `json:"area"`
	What  string `json:"what"`
	State string `json:"state"`
	Found string `json:"found"`
	Next  string `json:"next,omitempty"` // what to do
}

// doctor collects findings. It changes nothing on the host.
type doctor struct {
	area string
	list []finding
}

func (d *doctor) add(what, state, found, next string) {
	d.list = append(d.list, finding{d.area, what, state, strings.Join(strings.Fields(found), " "), next})
}

func (d *doctor) ok(what, format string, a ...any) {
	d.add(what, stateOK, fmt.Sprintf(format, a...), "")
}

// expect is ok if good, and else what the state says.
func (d *doctor) expect(good bool, what, state, found, next string) {
	if good {
		state, next = stateOK, ""
	}
	d.add(what, state, found, next)
}

func doctorCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "examine this host, its TPM, a token and a signer's configuration; says what would be refused and what to do",
		Flags: []cli.Flag{jsonFlag(),
			&cli.StringFlag{Name: "config", Usage: "the signer's configuration `FILE`; its TPM and tokens are examined too"},
			&cli.StringFlag{Name: "tpm", Usage: "`ADDRESS` of a TPM: a device, or the socket of a software TPM"}, hsmFlag()},
		Action: func(c *cli.Context) error {
			d := new(doctor)
			d.host()
			address, config := c.String("tpm"), c.String("config")
			if address == "" && config == "" && c.String("token") == "" {
				address = "/dev/tpmrm0"
			}
			if address != "" {
				d.tpm(address, tpm.Options{}, "")
			}
			if uri := c.String("token"); uri != "" {
				d.token(uri)
			}
			if config != "" {
				d.signer(c)
			}
			return d.report(e, c)
		},
	}
}

func (d *doctor) report(e *env, c *cli.Context) error {
	refused := 0
	for _, f := range d.list {
		if f.State == stateRefused {
			refused++
		}
	}
	if err := e.show(c, map[string]any{"findings": d.list, "refused": refused}, func() {
		area := ""
		w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
		for _, f := range d.list {
			if f.Area != area {
				area = f.Area
				fmt.Fprintf(w, "%s\n", area)
			}
			mark := map[string]string{stateOK: "ok", stateNote: "note", stateRefused: "REFUSED"}[f.State]
			fmt.Fprintf(w, "  %s\t%s\t%s\n", mark, f.What, f.Found)
			if f.Next != "" {
				fmt.Fprintf(w, "  \t\t-> %s\n", f.Next)
			}
		}
		_ = w.Flush() // standard output
	}); err != nil {
		return err
	}
	switch {
	case refused == 1:
		return errors.New("there is a finding because of which something would be refused")
	case refused > 0:
		return fmt.Errorf("there are %d findings because of which something would be refused", refused)
	}
	return nil
}

// host examines the kernel and the clock.
func (d *doctor) host() {
	d.area = "this host"
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		d.ok("kernel", "%s %s", unix.ByteSliceToString(u.Sysname[:]), unix.ByteSliceToString(u.Release[:]))
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		fd, pidfd := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		d.expect(pidfd == nil, "callers can be identified", stateRefused, fmt.Sprintf("SO_PEERPIDFD: %v", verdict(pidfd)), "the signer needs Linux 6.5 or later")
		if pidfd == nil {
			_ = unix.Close(fd)
		}
		_ = unix.Close(pair[0])
		_ = unix.Close(pair[1])
	}
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, 1) // LANDLOCK_CREATE_RULESET_VERSION
	if errno != 0 {
		d.add("Landlock", stateNote, errno.Error(), "agents cannot be confined: boot with Landlock in the kernel's list of security modules (lsm=)")
	} else {
		d.ok("Landlock", "ABI %d", abi)
	}
	var t unix.Timex
	if state, err := unix.Adjtimex(&t); err == nil {
		unsynchronised := state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0
		d.expect(!unsynchronised, "clock", stateNote, fmt.Sprintf("synchronised: %v, at most %d microseconds off", !unsynchronised, t.Maxerror), "run chrony or a PTP client: statements carry the time, and receivers refuse what is off")
	}
}

func verdict(err error) string {
	if err != nil {
		return err.Error()
	}
	return "yes"
}

// tpm examines a TPM and times a signature with a key that it does not keep.
// Where the TPM audits signatures they must stand in its signer's journal.
func (d *doctor) tpm(address string, o tpm.Options, journalFile string) {
	d.area = "TPM at " + address
	dev, err := tpm.OpenWith(address, o)
	if err != nil {
		d.add("opens", stateRefused, err.Error(), "no agent's key can be used: is there a TPM 2.0, and may this user use it (group tss)?")
		return
	}
	defer dev.Close()
	info, err := dev.Info()
	if err != nil {
		d.add("answers", stateRefused, err.Error(), "")
		return
	}
	d.ok("what it is", "%s %s, firmware %s, specification level %d revision %d.%02d", info.Manufacturer, info.Model, info.Firmware, info.Level, info.Revision/100, info.Revision%100)
	d.expect(len(info.Missing) == 0, "abilities", stateRefused, "missing: "+orNone(info.Missing), "this TPM cannot do it; a firmware update may help")
	d.expect(contains(info.Banks, "sha256"), "PCR banks", stateRefused, strings.Join(info.Banks, ", "), "turn the SHA-256 bank on in the firmware's setup")
	d.expect(!info.LockedOut, "lockout", stateNote, fmt.Sprintf("%d of %d failures, locked out: %v", info.LockoutCounter, info.MaxAuthFail, info.LockedOut), "tpm2_dictionarylockout clears it; keys of Inkan are not affected")
	d.expect(!info.OwnerAuthSet && !info.EndorsementSet || len(o.OwnerAuth)+len(o.EndorsementAuth) > 0, "hierarchies", stateNote,
		fmt.Sprintf("authorization of owner: %v, endorsement: %v", info.OwnerAuthSet, info.EndorsementSet), "name the files with them in the signer's configuration: owner_auth_file, endorsement_auth_file")
	d.ok("room", "%d objects, %d sessions, %d counters", info.TransientObjects, info.ActiveSessions, info.NVCounters)
	d.expect(info.ClockSafe, "clock", stateNote, fmt.Sprintf("%v since it was cleared, reset %d times, restarted %d times, safe: %v", time.Duration(info.ClockMilliseconds)*time.Millisecond, info.ResetCount, info.RestartCount, info.ClockSafe),
		"it was not shut down in order; it becomes safe again by itself")
	d.expect(info.CommandAudit, "command audit", stateNote, fmt.Sprint(info.CommandAudit), "this TPM cannot testify how many signatures it made")
	d.endorsementKeys(dev)
	d.speed(dev, journalFile)
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "nothing"
	}
	return strings.Join(list, ", ")
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

func (d *doctor) endorsementKeys(dev *tpm.Device) {
	eks, err := dev.EKs()
	if err != nil || len(eks) == 0 {
		d.add("endorsement keys", stateRefused, fmt.Sprintf("none: %v", err), "the device cannot be enrolled")
		return
	}
	certified := false
	for i := range eks {
		digest, err := attest.SPKIDigest(eks[i].Public)
		if err != nil {
			d.add("endorsement key", stateRefused, err.Error(), "")
			continue
		}
		certified = certified || eks[i].Certificate != nil
		d.ok("endorsement key "+eks[i].Algorithm(), "SHA-256 %x, certificate: %v", digest, eks[i].Certificate != nil)
	}
	if !certified {
		d.add("endorsement certificate", stateNote, "none in the TPM", "the issuer's operator must pin the key: inkan issuer device add --ek-pin")
	}
}

// samples is how many signatures are timed.
const samples = 5

func (d *doctor) speed(dev *tpm.Device, journalFile string) {
	on, err := dev.Auditing()
	switch {
	case err != nil:
		d.add("a signature", stateRefused, err.Error(), "")
		return
	case on && journalFile == "":
		d.ok("a signature", "not timed: the TPM audits signatures, and this one would be missing in its signer's journal; give --config")
		return
	case on:
		j, err := journal.Open(journalFile)
		if err == nil {
			defer j.Close()
			err = dev.StartAudit(j)
		}
		if err != nil {
			d.add("a signature", stateRefused, err.Error(), "")
			return
		}
	}
	file, _, err := dev.CreateKey(tpm.SigningTemplate())
	if err != nil {
		d.add("a signature", stateRefused, err.Error(), "")
		return
	}
	k, err := dev.LoadKey(file, nil)
	if err == nil {
		var each time.Duration
		if each, err = timed(k); err == nil {
			d.ok("a signature", "%.2f ms with a key made for this and dropped", float64(each.Microseconds())/1000)
			return
		}
	}
	d.add("a signature", stateRefused, err.Error(), "")
}

func timed(k crypto.Signer) (time.Duration, error) {
	digest := sha256.Sum256([]byte("inkan doctor"))
	begun := time.Now()
	for range samples {
		if _, err := k.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
			return 0, err
		}
	}
	return time.Since(begun) / samples, nil
}

// token examines a PKCS#11 token and the keys in it.
func (d *doctor) token(uri string) {
	u, err := hsm.ParseURI(uri)
	if err != nil {
		d.area = "token"
		d.add("URI", stateRefused, err.Error(), "")
		return
	}
	d.area = "token " + u.Token + u.Serial
	t, err := hsm.Open(uri, hsm.Options{})
	if err != nil {
		next := "is the module's path right, its configuration found, the token there?"
		if errors.Is(err, hsm.ErrPIN) {
			next = "mend the PIN before trying again: tokens lock after a few wrong ones"
		}
		d.add("opens", stateRefused, err.Error(), next)
		return
	}
	defer t.Close()
	d.describeToken(t)
	keys, err := t.List()
	if err != nil {
		d.add("keys", stateRefused, err.Error(), "")
		return
	}
	var good []byte
	for _, k := range keys {
		if err := k.Check(); err != nil {
			d.add(fmt.Sprintf("key %x %s", k.ID, k.Label), stateNote, err.Error(), "it is refused as an agent's key: make one with inkan hsm keygen")
			continue
		}
		good = k.ID
		d.ok(fmt.Sprintf("key %x %s", k.ID, k.Label), "sensitive, never extractable, made in the token: %s", reported(k.Local))
	}
	if good == nil {
		d.add("keys", stateNote, "none that is good", "make one: inkan hsm keygen")
		return
	}
	begun := time.Now()
	if _, err := t.Key(good); err != nil { // which has it sign a random digest, and verifies that
		d.add("a signature", stateRefused, err.Error(), "")
		return
	}
	d.ok("a signature", "%.2f ms with key %x, finding it and verifying included", float64(time.Since(begun).Microseconds())/1000, good)
}

func reported(b *bool) string {
	if b == nil {
		return "not reported"
	}
	return fmt.Sprint(*b)
}

func (d *doctor) describeToken(t *hsm.Token) {
	i, err := t.Info()
	if err != nil {
		d.add("answers", stateRefused, err.Error(), "")
		return
	}
	d.ok("module", "%s, Cryptoki %s", i.Library, i.Cryptoki)
	d.ok("what it is", "%s %s, serial %s, firmware %s, hardware slot: %v", i.Manufacturer, i.Model, i.Serial, i.Firmware, i.HardwareSlot)
	d.expect(len(i.Signs) > 0, "signs by", stateRefused, orNone(i.Signs), "an agent's key needs CKM_ECDSA")
	d.expect(len(i.Generates) > 0, "makes keys", stateNote, orNone(i.Generates), "keys must be made with the vendor's tools")
	sessions := "no limit stated"
	if i.SessionsMax > 0 {
		sessions = fmt.Sprint(i.SessionsMax)
	}
	d.ok("sessions", "%s; this process opened %d", sessions, t.Stats().Sessions)
	d.expect(!i.PINCountLow && !i.PINFinalTry && !i.PINLocked, "PIN", stateNote, fmt.Sprintf("wrong ones since the last login: %v, last try: %v", i.PINCountLow, i.PINFinalTry), "somebody else tries PINs: find out who, before the token locks")
	if i.ClockUTC != "" {
		d.ok("clock", "%s UTC", i.ClockUTC)
	}
}

// signer examines a configuration, and for each agent its files, its key and
// whether the issuer would certify it in the state that the host is in.
func (d *doctor) signer(c *cli.Context) {
	d.area = "signer's configuration"
	config, err := readSignerConfig(c)
	if err != nil {
		d.add("is valid", stateRefused, err.Error(), "")
		return
	}
	d.ok("is valid", "%d agents, socket %s", len(config.Agents), config.Socket)
	if fi, err := os.Stat(config.StateDir); errors.Is(err, fs.ErrNotExist) {
		d.add("state", stateNote, config.StateDir+" does not exist", "inkan signer enrol makes it")
	} else if err != nil {
		d.add("state", stateRefused, err.Error(), "")
	} else {
		d.expect(fi.Mode().Perm()&0o077 == 0, "state", stateNote, fmt.Sprintf("%s has mode %04o", config.StateDir, fi.Mode().Perm()), "chmod 700: nobody else needs to see it")
	}
	h, err := openHost(config)
	if err != nil {
		d.add("opens", stateRefused, err.Error(), "")
		return
	}
	options, err := hierarchyAuth(config)
	h.close() // a software TPM serves one client at a time
	if err == nil && config.TPM != "" {
		books := filepath.Join(config.StateDir, journal.FileName)
		if _, err := os.Stat(books); err != nil {
			books = ""
		}
		d.tpm(config.TPM, options, books)
	}
	if h, err = openHost(config); err != nil {
		d.add("opens", stateRefused, err.Error(), "")
		return
	}
	defer h.close()
	for i := range config.Agents {
		d.area = "agent " + config.Agents[i].Name
		d.agent(c.Context, h, &config.Agents[i])
	}
}

func (d *doctor) agent(ctx context.Context, h *host, a *signer.AgentConfig) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	state := signer.ReadState(h.config.StateDir, a.Name)
	chain, err := state.Chain(attest.PurposeAction)
	switch {
	case err != nil:
		d.add("certificate", stateRefused, err.Error(), "enrol it anew")
	case len(chain) == 0:
		d.add("certificate", stateNote, "none yet", "inkan signer enrol --agent "+a.Name)
	default:
		left := time.Until(chain[0].NotAfter)
		d.expect(left > 0, "certificate", stateRefused, fmt.Sprintf("serial %x, until %s", chain[0].SerialNumber, chain[0].NotAfter.UTC().Format(time.RFC3339)), "renewal failed: the signer's log says why")
	}
	if h.dev == nil {
		d.add("attestation", stateNote, "the host has no TPM: nothing is proven of it, and an older record in the place of the record is not found out", "")
	} else {
		d.attested(ctx, h, a.Name, chain)
	}
	if a.Key == "" {
		d.keyInTPM(h, state, chain)
		return
	}
	k, closer, err := keyuri.OpenSealed(a.Key, func(file []byte) ([]byte, error) { return h.unseal(ctx, a.Name, file) })
	if err != nil {
		d.add("key", stateRefused, err.Error(), "inkan doctor --token says more of the token")
		return
	}
	defer closer.Close()
	if t, ok := closer.(*hsm.Token); ok {
		d.describeToken(t)
	}
	d.certified(chain, k)
}

// attested examines what ties an agent to this host's TPM.
func (d *doctor) attested(ctx context.Context, h *host, agent string, chain []*x509.Certificate) {
	if r, err := h.dev.Counter(agent).Read(); err == nil {
		d.ok("rollback protection", "counter %#x is %d", tpm.CounterIndex(agent), r.Value)
	} else if errors.Is(err, tpm.ErrNoCounter) {
		d.expect(len(chain) == 0, "rollback protection", stateRefused, "the TPM has no counter for the record", "enrolment makes it; if it was there before, somebody has removed it: docs/record.md")
	} else {
		d.add("rollback protection", stateRefused, err.Error(), "")
	}
	policies, err := attester.Policies(ctx, h.issuer, h.dev, agent)
	if p, ok := errors.AsType[*problem.Problem](err); ok && p.Check != "" {
		d.add("issuer", stateRefused, err.Error(), "the name in front is the check that decided: docs/attestation.md")
	} else if err != nil {
		d.add("issuer", stateRefused, err.Error(), "issuer.url and issuer.ca in the configuration say which issuer is asked; is it running?")
	} else {
		d.ok("issuer", "knows this device and the agent at %s", h.config.Issuer.URL)
		d.approval(h, policies)
	}
}

// approval says whether the host is in an approved state, and if not by which PCRs.
func (d *doctor) approval(h *host, p *tpm.Policies) {
	values, err := h.dev.ReadPCRs(attest.Union(p.Approved))
	if err != nil {
		d.add("approved state", stateRefused, err.Error(), "")
		return
	}
	for _, a := range p.Approved {
		if attest.Matches(a, values) {
			d.ok("approved state", "policy %q", a.Name)
			return
		}
	}
	d.add("approved state", stateRefused, (&tpm.PCRError{Current: values, Policies: p.Approved}).Error(), "if the change is meant, approve it: inkan tpm pcrs, then inkan issuer policy approve")
}

func (d *doctor) keyInTPM(h *host, state *signer.State, chain []*x509.Certificate) {
	files, err := state.Keys(attest.PurposeAction)
	if err != nil || files[attest.PurposeAction] == nil {
		d.add("key", stateNote, "none yet", "inkan signer enrol makes it")
		return
	}
	var policies tpm.Policies
	ok, err := state.Policies(&policies)
	if err != nil || !ok {
		d.add("key", stateRefused, "its policies cannot be read", "enrol it anew")
		return
	}
	k, err := h.dev.LoadKey(files[attest.PurposeAction], &policies)
	if err != nil {
		d.add("key", stateRefused, err.Error(), "")
		return
	}
	d.ok("key", "of this TPM: it was loaded")
	if values, err := h.dev.ReadPCRs(attest.Union(policies.Approved)); err != nil {
		d.add("approvals on this host", stateRefused, err.Error(), "")
	} else {
		fits := slices.ContainsFunc(policies.Approved, func(a attest.ApprovedPolicy) bool { return attest.Matches(a, values) })
		d.expect(fits, "approvals on this host", stateRefused, fmt.Sprintf("one of %d fits the host's state: %v", len(policies.Approved), fits),
			"what the issuer has approved comes with an enrolment: stop the signer, inkan signer enrol, start it")
	}
	d.certified(chain, k)
}

// certified says whether the certificate is for the key.
func (d *doctor) certified(chain []*x509.Certificate, k crypto.Signer) {
	if len(chain) == 0 {
		return
	}
	public, ok := k.Public().(interface{ Equal(crypto.PublicKey) bool })
	d.expect(ok && public.Equal(chain[0].PublicKey), "certificate is for the key", stateRefused, fmt.Sprint(ok && public.Equal(chain[0].PublicKey)), "enrol it anew: inkan signer enrol")
}
