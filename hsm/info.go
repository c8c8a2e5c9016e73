package hsm

// Info is what a module and its token say of themselves.
type Info struct {
	Library         string   `json:"library"` // the module's own description and version
	Cryptoki        string   `json:"cryptoki"`
	Label           string   `json:"label"`
	Manufacturer    string   `json:"manufacturer"`
	Model           string   `json:"model"`
	Serial          string   `json:"serial"`
	Firmware        string   `json:"firmware"`
	SessionsMax     uint     `json:"sessions_max"` // 0: the token states none
	PINCountLow     bool     `json:"pin_count_low"`
	PINFinalTry     bool     `json:"pin_final_try"`
	PINLocked       bool     `json:"pin_locked"`
	HardwareSlot    bool     `json:"hardware_slot"`
	Signs           []string `json:"signs"`     // mechanisms that this package signs with
	Generates       []string `json:"generates"` // kinds of keys that it can make
	ClockUTC        string   `json:"clock_utc,omitempty"`
	MechanismsTotal int      `json:"mechanisms_total"`
}

// Info asks the module and the token about themselves. It changes nothing.
func (t *Token) Info() (*Info, error) {
	r, err := t.do(request{Op: opInfo}, nil, nil)
	if err != nil {
		return nil, err
	}
	return r.Info, nil
}
