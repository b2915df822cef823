"""The option that refuses to run code of settings from strangers."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_t2i.rewards.table import is_imported
from rlhf_t2i.rewards.terms import reward_names_of
from rlhf_t2i.settings.base import Rule, Settings, options_of


@dataclass(frozen=True, kw_only=True)
class ImportSettings(Settings, group="reward"):
    """Code that rewards run."""

    no_imports: bool = False
    """Refuse rewards of the form module:function or file.py:function, whose import runs code: for settings of others,
    such as a config or a run folder."""

    def rules(self) -> list[Rule]:
        named = [option.name for option in options_of(type(self)) if option.names]
        return [
            *super().rules(),
            *(
                (
                    name,
                    not self.no_imports or not any(map(is_imported, reward_names_of(getattr(self, name) or ""))),
                    _RULE,
                )
                for name in named
            ),
        ]


_RULE = "without module:function, which no_imports refuses"
